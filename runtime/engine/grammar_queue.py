"""Compiles grammars beside an engine's steps: no other sequence waits for a schema."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import trio

from sagellm.backends.step import Matcher, MatcherError
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import FinishReason
from sagellm.runtime.sampling import Grammar

if TYPE_CHECKING:
    from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
    from sagellm.runtime.grammars.matcher import GrammarMatcher

log = get_logger("sagellm.engine")

_NUM_THREADS = 2  # a slow grammar leaves a thread to the others
_IDLE_S = 0.25  # from one look whether the engine has no sequence to the next
_Key: TypeAlias = tuple[str, Grammar | None]  # salt and grammar


class Refusal(NamedTuple):
    """The reason why a sequence ends without a matcher."""

    reason: FinishReason
    message: str


Outcome: TypeAlias = Matcher | Refusal


class LateCompiler:
    """A compiler that `make` imports and makes at the first use. Any thread may call any method.

    The import of llguidance takes 10 ms, and no first token needs it.
    """

    def __init__(self, make: "Callable[[], GrammarCompiler]") -> None:
        self._make = make
        self._making = threading.Lock()
        self._made: GrammarCompiler | None = None

    def open(self) -> None:
        """Open the vocabulary, as `GrammarCompiler.open`."""
        self._compiler().open()

    def compile(self, grammar: Grammar, salt: str, **options: Any) -> "GrammarMatcher":
        """A matcher of a grammar, as `GrammarCompiler.compile`."""
        return self._compiler().compile(grammar, salt, **options)

    def _compiler(self) -> "GrammarCompiler":
        with self._making:
            if self._made is None:
                self._made = self._make()
            return self._made


class GrammarQueue:
    """The grammars of one engine that wait for a thread. Threads start with the first grammar, or
    with `open_when_idle`.

    Tenants take turns: one that sends many slow grammars delays its own. `sequences`: the open
    sequences of the engine. `done` is called on the trio loop, for open sequences only. `compiler`
    None: no sequence has a grammar.
    """

    def __init__(
        self,
        compiler: LateCompiler | None,
        sequences: Mapping[Fence, Sequence],
        done: Callable[[Sequence, Outcome], None],
    ) -> None:
        self._compiler = compiler
        self._sequences = sequences
        self._done = done
        self._threads: ThreadPoolExecutor | None = None
        # By tenant, whose turn comes first, and by grammar.
        self._waiting: dict[str, dict[_Key, list[Sequence]]] = {}
        # Sequences that come after a thread began with their grammar wait until it has ended. They
        # take no second thread, which could only wait for the first.
        self._running: set[_Key] = set()
        self._is_settled = threading.Event()  # a grammar opens the vocabulary, or nobody needs it

    def open_when_idle(self) -> None:
        """Open the vocabulary on a thread once the engine has no sequence, unless a grammar comes
        first, which opens it too.

        This holds Python's lock for tenths of a second, so it comes neither before the first token
        nor beside others.
        """
        if self._compiler is not None:
            self._pool().submit(self._open_when_idle).add_done_callback(_log_fault)

    def _open_when_idle(self) -> None:
        assert self._compiler is not None
        while not self._is_settled.wait(_IDLE_S):
            if not self._sequences:
                self._compiler.open()
                return

    def put(self, sequence: Sequence) -> None:
        """Compile the grammar of a sequence, and call `done` with the outcome."""
        key = sequence.state.salt, sequence.sampling.grammar
        grammars = self._waiting.setdefault(sequence.state.user_id, {})
        grammars.setdefault(key, []).append(sequence)
        self._start()

    async def close(self) -> None:
        """End the threads. Grammars that still wait are dropped."""
        self._waiting.clear()
        self._is_settled.set()
        threads, self._threads = self._threads, None
        if threads is not None:
            await trio.to_thread.run_sync(partial(threads.shutdown, cancel_futures=True))

    def _start(self) -> None:
        """Give free threads to grammars that wait."""
        while len(self._running) < _NUM_THREADS and (waiting := self._next()):
            self._submit(*waiting)

    def _next(self) -> tuple[str, _Key, list[Sequence]] | None:
        """Take the next grammar of the next tenant."""
        for user_id, grammars in self._waiting.items():
            for key in grammars:
                if key not in self._running:
                    return user_id, key, self._take(user_id, key)
        return None

    def _take(self, user_id: str, key: _Key) -> list[Sequence]:
        """Take the sequences that wait for a grammar. The tenant's next turn comes last."""
        grammars = self._waiting.pop(user_id, {})
        sequences = grammars.pop(key, [])
        if grammars:
            self._waiting[user_id] = grammars
        return sequences

    def _submit(self, user_id: str, key: _Key, sequences: list[Sequence]) -> None:
        self._is_settled.set()
        self._running.add(key)
        token = trio.lowlevel.current_trio_token()

        def hand_over(compiled: "Future[list[Outcome | None]]") -> None:
            with suppress(trio.RunFinishedError):  # the engine ended first
                token.run_sync_soon(self._finish, user_id, key, sequences, compiled)

        self._pool().submit(self._compile, sequences).add_done_callback(hand_over)

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                _NUM_THREADS, thread_name_prefix="sagellm-grammar-compile"
            )
        return self._threads

    def _compile(self, sequences: list[Sequence]) -> list[Outcome | None]:
        """A matcher, or a refusal, for each of several sequences with the same grammar; None if the
        sequence has ended. Raises GrammarError.
        """
        return [self._matcher(one) if self._is_open(one) else None for one in sequences]

    def _matcher(self, sequence: Sequence) -> Outcome:
        """The matcher of one sequence. It has followed the tokens that were emitted before."""
        state, sampling = sequence.state, sequence.sampling
        assert sampling.grammar is not None
        assert self._compiler is not None
        matcher = self._compiler.compile(
            sampling.grammar,
            state.salt,
            user_id=state.user_id,
            ignores_eos=sampling.ignore_eos,
        )
        try:
            if not state.emitted_token_ids or matcher.follow(state.emitted_token_ids):
                return matcher
        except MatcherError as error:
            return Refusal("refused", str(error))
        return Refusal("refused", "the tokens so far do not belong to the grammar")

    def _finish(
        self,
        user_id: str,
        key: _Key,
        sequences: list[Sequence],
        compiled: "Future[list[Outcome | None]]",
    ) -> None:
        self._running.remove(key)
        if compiled.cancelled():
            return  # the engine is being closed
        if error := compiled.exception():
            sequences = sequences + self._take(user_id, key)
            outcomes: list[Outcome | None] = [_refusal(error)] * len(sequences)
        else:
            outcomes = compiled.result()
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            if outcome is not None and self._is_open(sequence):
                self._done(sequence, outcome)
        self._start()

    def _is_open(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.fence) is sequence


def _log_fault(opened: "Future[Any]") -> None:
    """Log why a vocabulary did not open. Each grammar is told a GrammarError, which is no fault."""
    error = None if opened.cancelled() else opened.exception()
    if error is not None and not isinstance(error, GrammarError):
        log.error("grammar_vocabulary_failed", exc_info=error)


def _refusal(error: BaseException) -> Refusal:
    if isinstance(error, GrammarError):
        return Refusal("refused", str(error))
    log.error("grammar_failed", exc_info=error)
    return Refusal("failed", "the engine could not compile the grammar")
