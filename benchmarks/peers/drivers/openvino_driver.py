"""OpenVINO GenAI's continuous batching, with its default precisions."""

from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from wire import Ask, Clock, Load, serve

GIB = 1 << 30
STEP_TOKENS = 4096


class OpenVino:
    """Steps the pipeline until every request has its tokens."""

    _pipeline: Any
    _num_requests = 0

    def load(self, request: Load) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = 0  # grows on demand
        scheduling.max_num_batched_tokens = STEP_TOKENS
        scheduling.max_num_seqs = request.max_seqs
        scheduling.enable_prefix_caching = False
        device = {"INFERENCE_NUM_THREADS": request.threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = genai.ContinuousBatchingPipeline(request.path, scheduling, "CPU", device)

    def run(self, request: Ask) -> list[list[float]]:
        clock = Clock(request)
        handles = [self._add(prompt, _greedy(request.num_out)) for prompt in request.prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for sequence, handle in enumerate(handles):
                clock.note(sequence, _num_new(handle))
            if clock.is_late:
                for handle in handles:
                    handle.cancel()
        return clock.times

    def score(self, prompt: list[int]) -> list[float]:
        options = _greedy(1)
        options.echo = True
        options.logprobs = 1
        handle = self._add(prompt, options)
        found: list[float] = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            found += _logprobs(handle)
        return found[1 : len(prompt)]

    def _add(self, prompt: list[int], options: Any) -> Any:
        self._num_requests += 1
        token_ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._num_requests, token_ids, options)


def _greedy(num_out: int) -> Any:
    options = genai.GenerationConfig()
    options.max_new_tokens = options.min_new_tokens = num_out
    options.ignore_eos = True
    options.do_sample = False
    return options


def _num_new(handle: Any) -> int:
    if not handle.can_read():
        return 0
    return sum(len(output.generated_ids) for output in handle.read().values())


def _logprobs(handle: Any) -> list[float]:
    if not handle.can_read():
        return []
    return [
        float(logprob)
        for output in handle.read().values()
        for logprob in output.generated_log_probs
    ]


if __name__ == "__main__":
    serve(OpenVino())
