"""An engine that embeds: texts wait, batches of whole texts are computed, vectors leave."""

import heapq
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import trio

from sagellm.backends.arrays import Floats
from sagellm.backends.interface import Program
from sagellm.backends.text_batches import EmbeddingDevice, EmbeddingQueue, TextBatch
from sagellm.graphs.log import get_logger
from sagellm.runtime.containers import Buckets
from sagellm.runtime.engine.loop import STEP_TOKENS
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.runner import Watchdog
from sagellm.runtime.messages import (
    ENGINE_FAILED,
    FinishReason,
    SequenceState,
    Stamps,
    TokenEvent,
)
from sagellm.runtime.port import EngineFacts, EngineHealth, EngineLoad, EngineRefusal

log = get_logger("sagellm.engine")

_VERSION = 1  # of SequenceState
_LEAST_LENGTH = 1e-12  # of a vector that is scaled; as torch


@dataclass(frozen=True, slots=True)
class EmbeddingResources:
    """The parts that the engine is built from.

    `max_num_batched_tokens`: the most tokens of a batch, unless one text has more. `is_unit`: the
    program scales vectors to length 1. `threads`: as of `open_embedding_queue`.
    """

    facts: EngineFacts
    device: EmbeddingDevice
    program: Program
    vocab_size: int
    max_num_batched_tokens: int
    is_unit: bool
    threads: int | None = None


@dataclass(slots=True, eq=False)
class _Text:
    """A text in the engine. `rank`: texts of lower rank are computed first."""

    state: SequenceState
    rank: tuple[int, int]  # priority, number in order of submission
    started_s: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.state.request_id, self.state.choice, self.state.epoch

    def __len__(self) -> int:
        return len(self.state.prompt_token_ids)


@dataclass(slots=True)
class _Waiting:
    """The texts that wait, by rank. A text that was cancelled leaves the heap when it is taken."""

    heap: list[tuple[tuple[int, int], _Text]] = field(default_factory=list)
    num_tokens: int = 0

    def push(self, text: _Text) -> None:
        heapq.heappush(self.heap, (text.rank, text))
        self.num_tokens += len(text)

    def pop(self) -> _Text:
        text = heapq.heappop(self.heap)[1]
        self.num_tokens -= len(text)
        return text


class EmbeddingEngine:
    """Implements the engine port. Each text is a sequence, and has a single event.

    While a batch is computed, later texts gather, and the next batch takes as many of them as fit:
    texts of all requests share batches. A text is never cut.
    """

    def __init__(self, resources: EmbeddingResources, *, name: str, replica: int = 0) -> None:
        self.facts = resources.facts
        self.step_tokens = Buckets(STEP_TOKENS)
        self._resources = resources
        self._name = f"{name}[{replica}]"
        self._open: dict[tuple[str, int, int], _Text] = {}
        self._waiting = _Waiting()
        self._running: list[_Text] = []
        self._mailboxes: dict[str, Mailbox] = {}
        self._work = trio.Event()
        self._watchdog = Watchdog()
        self._num_submitted = self._num_steps = 0
        self._is_stopped = False

    async def submit(self, state: SequenceState) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_stopped:
            raise EngineRefusal("the engine has stopped", "shutting_down")
        check_text(state, self.facts, self._resources.vocab_size)
        self._num_submitted += 1
        text = _Text(state, (state.priority, self._num_submitted))
        if text.key in self._open:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        if not self._open:
            self._watchdog.reset(trio.current_time())
        self._open[text.key] = text
        self._waiting.push(text)
        self._work.set()

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        text = self._open.get((request_id, choice, epoch))
        if text is not None:  # a text that is computed now is computed to its end, in vain
            self._end(text, "cancelled")
            self.events(text.state.owner).flush()

    def events(self, owner: str) -> Mailbox:
        mailbox = self._mailboxes.setdefault(owner, Mailbox(self._wake))
        if self._is_stopped:
            mailbox.close()
        return mailbox

    @property
    def load(self) -> EngineLoad:
        num_running = sum(text.key in self._open for text in self._running)
        return EngineLoad(
            num_running=num_running,
            num_waiting=len(self._open) - num_running,
            num_pending_prefill_tokens=self._waiting.num_tokens,
            num_steps=self._num_steps,
        )

    @property
    def health(self) -> EngineHealth:
        has_work = any(self._is_ready(text) for text in self._open.values())
        return self._watchdog.health(trio.current_time(), has_work=has_work)

    async def idle(self) -> None:
        """Return at once: a text that has ended holds nothing."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        resources = self._resources
        queue = resources.device.open_embedding_queue(resources.threads)
        try:
            await self._compute(queue)
        finally:
            self._is_stopped = True
            for mailbox in self._mailboxes.values():
                mailbox.close()
            with trio.CancelScope(shield=True):  # a launch cannot be interrupted
                await trio.to_thread.run_sync(queue.close)

    # ---- batches -----------------------------------------------------------------------------

    async def _compute(self, queue: EmbeddingQueue) -> None:
        """Compute batch after batch. A batch is launched before the vectors of the one before it
        are handed on, so that the device need not wait for that.
        """
        done: tuple[list[_Text], Floats | Exception] | None = None
        while True:
            self._running = self._next_batch()
            launch = self._launch(queue, self._running) if self._running else None
            if done is not None:
                self._hand_on(*done)
                done = None
            if launch is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            done = self._running, await _result(launch)
            self._watchdog.finish_step(trio.current_time())

    def _wake(self) -> None:
        self._work.set()

    def _next_batch(self) -> list[_Text]:
        """Take texts by rank until the batch is full: the next text would exceed its tokens.

        Texts of one length are next to each other, because they are attended to together. Texts
        of a reader that does not read stay.
        """
        batch: list[_Text] = []
        kept: list[_Text] = []
        room = self._resources.max_num_batched_tokens
        waiting = self._waiting
        while waiting.heap and (not batch or len(waiting.heap[0][1]) <= room):
            text = waiting.pop()
            if text.key not in self._open or self._open[text.key] is not text:
                continue
            if not self._is_ready(text):
                kept.append(text)
                continue
            batch.append(text)
            room -= len(text)
        for text in kept:
            waiting.push(text)
        return sorted(batch, key=len)

    def _is_ready(self, text: _Text) -> bool:
        return not self.events(text.state.owner).is_full

    def _launch(self, queue: EmbeddingQueue, batch: list[_Text]) -> "Future[Floats]":
        now = trio.current_time()
        for text in batch:
            text.started_s = now
        self._num_steps += 1
        self.step_tokens.observe(sum(map(len, batch)))
        self._watchdog.start_step(now)
        sequences = [text.state.prompt_token_ids for text in batch]
        return queue.embed(self._resources.program, TextBatch(sequences))

    def _hand_on(self, batch: Sequence[_Text], found: Floats | Exception) -> None:
        """Post the vectors of a batch, or end its texts as failed."""
        if isinstance(found, Exception):
            log.error("batch_failed", engine=self._name, exc_info=found)
            for text in batch:
                self._end(text, "failed", error="the engine failed", code=ENGINE_FAILED)
        else:
            for text, vector in zip(batch, found, strict=True):
                if np.isfinite(vector).all():
                    vector = shortened(vector, text.state.dimensions, self._resources.is_unit)
                    self._end(text, "stop", vector=vector.astype("<f4", copy=False).tobytes())
                else:
                    self._end(text, "failed", error="the model gave a vector that is not finite")
        for mailbox in self._mailboxes.values():
            mailbox.flush()

    def _end(
        self,
        text: _Text,
        reason: FinishReason,
        *,
        vector: bytes = b"",
        error: str | None = None,
        code: str = "",
    ) -> None:
        """Post the event of a text, unless it has ended."""
        if self._open.get(text.key) is not text:
            return
        del self._open[text.key]
        state, now = text.state, trio.current_time()
        event = TokenEvent(
            request_id=state.request_id,
            choice=state.choice,
            epoch=state.epoch,
            finish_reason=reason,
            error=error,
            code=code,
            num_prompt_tokens=len(text),
            stamps=Stamps(
                started_s=text.started_s,
                prefilled_s=now if vector else None,
                finished_s=now,
            ),
            vector=vector,
        )
        self.events(state.owner).post(event)


def check_text(state: SequenceState, facts: EngineFacts, vocab_size: int) -> None:
    """Raise EngineRefusal for a sequence that an engine with `facts` cannot embed."""
    if state.version != _VERSION:
        raise EngineRefusal(
            f"the sequence has version {state.version}; this engine reads {_VERSION}"
        )
    if state.task != "embed" or state.adapter or state.num_emitted:
        raise EngineRefusal("this engine embeds texts, without adapters")
    token_ids = state.prompt_token_ids
    if not token_ids:
        raise EngineRefusal("the text is empty; give at least one token")
    if len(token_ids) > facts.max_model_len:
        raise EngineRefusal(
            f"the text has {len(token_ids)} tokens, and the model takes {facts.max_model_len}; "
            "shorten it"
        )
    if set(map(type, token_ids)) != {int}:  # exact types: a bool is an int, but no token id
        raise EngineRefusal("the text has something that is no token id")
    if not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise EngineRefusal(f"the text has token {wrong}; the model knows 0 ... {vocab_size - 1}")
    if state.dimensions is not None and not 1 <= state.dimensions <= facts.vector_len:
        raise EngineRefusal(
            f"dimensions is {state.dimensions}; the model has vectors of {facts.vector_len}"
        )


def shortened(vector: Floats, dimensions: int | None, is_unit: bool) -> Floats:
    """The first `dimensions` numbers of a vector, scaled again to length 1 if the whole vector was
    (Kusupati et al. 2022, arXiv:2205.13147).
    """
    if dimensions is None or dimensions == len(vector):
        return vector
    short = vector[:dimensions]
    if not is_unit:
        return short
    length = math.sqrt(float(np.square(short, dtype=np.float64).sum()))
    return short / np.float32(max(length, _LEAST_LENGTH))


async def _result(launch: "Future[Floats]") -> Floats | Exception:
    """The vectors of a launch, or its error."""
    token, over = trio.lowlevel.current_trio_token(), trio.Event()
    launch.add_done_callback(lambda _: token.run_sync_soon(over.set))
    await over.wait()
    error = launch.exception()
    if error is None:
        return launch.result()
    if not isinstance(error, Exception):
        raise error
    return error
