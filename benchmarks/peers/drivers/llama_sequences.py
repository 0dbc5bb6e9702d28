"""The C API that llama.cpp and ik_llama.cpp share: all sequences of a run in each batch."""

from typing import Any

import numpy as np
from wire import Ask, Clock, Load

BATCH = 2048  # the most tokens of a call
MICRO_BATCH = 512  # tokens computed at once; llama.cpp's default


class Llama:
    """Makes a context for each shape of a run: it has just enough room for the sequences.

    `api`: the Python module of the C API. A driver of one engine overrides `load_options`,
    `context_options` and `clear`.
    """

    context: Any = None
    _model: Any
    _shape = (0, 0)

    def __init__(self, api: Any) -> None:
        self.api = api

    def load_options(self) -> Any:
        """The options of loading a model."""
        return self.api.llama_model_default_params()

    def context_options(self) -> Any:
        """The options of a context. Its size, batches and threads are set afterwards."""
        return self.api.llama_context_default_params()

    def clear(self) -> None:
        """Remove all sequences from the KV cache of `context`."""
        raise NotImplementedError

    def load(self, request: Load) -> None:
        api = self.api
        api.llama_backend_init()
        self._threads = request.threads
        options = self.load_options()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(request.path.encode(), options)
        if not self._model:
            raise RuntimeError(f"cannot load {request.path}")
        self._num_words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def run(self, request: Ask) -> list[list[float]]:
        num_sequences, prompt_len = len(request.prompts), len(request.prompts[0])
        self._open(num_sequences, prompt_len + request.num_out)
        clock = Clock(request)
        last = self._prefill(request.prompts, clock)
        for number in range(1, request.num_out):
            if clock.is_late:
                break
            for sequence, token in enumerate(last):
                self._put(sequence, token, prompt_len + number - 1, True)
            self._decode()
            last = [self._greedy(sequence) for sequence in range(num_sequences)]
            clock.note_all()
        return clock.times

    def score(self, prompt: list[int]) -> list[float]:
        self._open(1, len(prompt))
        for position, token in enumerate(prompt):
            self._put(0, token, position, True)
        self._decode()
        found = []
        for position, token in enumerate(prompt[1:]):
            row = self._logits(position).astype(np.float64)
            found.append(float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum())))
        return found

    def _open(self, num_sequences: int, length: int) -> None:
        shape = (num_sequences, -(-length // 256) * 256)
        if shape != self._shape:
            if self.context:
                self.api.llama_free(self.context)
            self.context, self._shape = self._new(*shape), shape
        self.clear()

    def _new(self, num_sequences: int, length: int) -> Any:
        options = self.context_options()
        options.n_ctx = num_sequences * length
        options.n_seq_max = num_sequences
        options.n_batch, options.n_ubatch = BATCH, MICRO_BATCH
        options.n_threads = options.n_threads_batch = self._threads
        context = self.api.llama_init_from_model(self._model, options)
        if not context:
            raise MemoryError(f"no context of {num_sequences} x {length} tokens")
        return context

    def _prefill(self, prompts: list[list[int]], clock: Clock) -> list[int]:
        """Prefill all prompts, as many a call as fit; returns the first token of each sequence."""
        first = [0] * len(prompts)
        ends: dict[int, int] = {}
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                is_end = position == len(prompt) - 1
                if is_end:
                    ends[self._batch.n_tokens] = sequence
                self._put(sequence, token, position, is_end)
                if self._batch.n_tokens == BATCH:
                    self._finish(ends, first, clock)
        self._finish(ends, first, clock)
        return first

    def _finish(self, ends: dict[int, int], first: list[int], clock: Clock) -> None:
        """Compute the batch. `ends`: the rows from which a first token is sampled."""
        self._decode()
        for row, sequence in ends.items():
            first[sequence] = self._greedy(row)
            clock.note(sequence)
        ends.clear()

    def _put(self, sequence: int, token: int, position: int, draws: bool) -> None:
        row = self._batch.n_tokens
        self._batch.token[row] = token
        self._batch.pos[row] = position
        self._batch.n_seq_id[row] = 1
        self._batch.seq_id[row][0] = sequence
        self._batch.logits[row] = draws
        self._batch.n_tokens = row + 1

    def _decode(self) -> None:
        if self._batch.n_tokens:
            failed = self.api.llama_decode(self.context, self._batch)
            self._batch.n_tokens = 0
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")

    def _greedy(self, row: int) -> int:
        return int(self._logits(row).argmax())

    def _logits(self, row: int) -> Any:
        found = self.api.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(found, shape=(self._num_words,))
