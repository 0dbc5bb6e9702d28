"""vLLM's CPU build, offline, compiled, with the engine in this process; with zentorch, if there.

Its CPU worker reads the gigabytes of KV and the list of cores from the environment, at import.
"""

import os
from importlib.util import find_spec
from typing import Any

from wire import Ask, Clock, Load, serve

GIB = 1 << 30


class Vllm:
    """Steps the engine until every request has its tokens."""

    _num_requests = 0

    def load(self, request: Load) -> None:
        cores = sorted(os.sched_getaffinity(0))[: request.threads]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import LLM, SamplingParams  # reads the environment variables
        from vllm.platforms import current_platform
        from vllm.sampling_params import StructuredOutputsParams

        if find_spec("zentorch") and not current_platform.is_zen_cpu():
            raise RuntimeError("zentorch is installed, but vLLM does not use it on this CPU")
        self._params = SamplingParams
        self._bound = StructuredOutputsParams
        self._engine: Any = LLM(
            model=request.path,
            dtype="bfloat16",
            skip_tokenizer_init=not request.tokenizer,
            max_model_len=request.max_len,
            max_num_seqs=request.max_seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine

    def run(self, request: Ask) -> list[list[float]]:
        clock = Clock(request)
        bound = self._bound(json=request.schema) if request.schema else None
        params = self._greedy(request.num_out, structured_outputs=bound)
        names = [self._add(prompt, params) for prompt in request.prompts]
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                sequence = names.index(output.request_id)
                done = len(output.outputs[0].token_ids)
                clock.note(sequence, done - len(clock.times[sequence]))
            if clock.is_late:
                self._engine.abort_request(names)
        return clock.times

    def score(self, prompt: list[int]) -> list[float]:
        self._add(prompt, self._greedy(1, prompt_logprobs=0))
        last: Any = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                last = output
        rows = zip(last.prompt_logprobs[1:], prompt[1:], strict=True)
        return [float(row[token].logprob) for row, token in rows]

    def _add(self, prompt: list[int], params: Any) -> str:
        self._num_requests += 1
        name = str(self._num_requests)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _greedy(self, num_out: int, **more: Any) -> Any:
        return self._params(
            temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False, **more
        )


if __name__ == "__main__":
    serve(Vllm())
