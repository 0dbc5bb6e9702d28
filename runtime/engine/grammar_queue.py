"""Compiles grammars beside an engine's steps: no other sequence waits for a schema."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import trio

from sagellm.backends.step import Matcher
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
from sagellm.runtime.messages import FinishReason

log = get_logger("sagellm.engine")

_NUM_THREADS = 2  # a slow grammar leaves a thread to the others
# Called with the sequence, whose `matcher` is set, or with why it ends: a reason and a message.
Compiled: TypeAlias = Callable[[Sequence, tuple[FinishReason, str] | None], None]


class GrammarQueue:
    """The grammars of one engine that wait for a thread. Threads start with the first grammar."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads: ThreadPoolExecutor | None = None

    def put(self, sequence: Sequence, done: Compiled) -> None:
        """Compile the grammar of a sequence, and call `done` with the outcome on this trio loop."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                _NUM_THREADS, thread_name_prefix="sagellm-grammar-compile"
            )
        token = trio.lowlevel.current_trio_token()

        def hand_over(compiled: "Future[Matcher]") -> None:
            with suppress(trio.RunFinishedError):  # the engine ended first
                token.run_sync_soon(_finish, sequence, compiled, done)

        compile_ = partial(self._compile, sequence)
        self._threads.submit(compile_).add_done_callback(hand_over)

    async def close(self) -> None:
        """End the threads. Grammars that still wait are dropped."""
        threads, self._threads = self._threads, None
        if threads is not None:
            await trio.to_thread.run_sync(partial(threads.shutdown, cancel_futures=True))

    def _compile(self, sequence: Sequence) -> Matcher:
        sampling = sequence.sampling
        assert sampling.grammar is not None
        return self._compiler.compile(
            sampling.grammar, sequence.state.salt, ignores_eos=sampling.ignore_eos
        )


def _finish(sequence: Sequence, compiled: "Future[Matcher]", done: Compiled) -> None:
    if compiled.cancelled():
        return  # the engine is being closed
    error = compiled.exception()
    if error is None:
        sequence.matcher = compiled.result()
        done(sequence, None)
    elif isinstance(error, GrammarError):
        done(sequence, ("refused", str(error)))
    else:
        log.error("grammar_failed", exc_info=error)
        done(sequence, ("failed", "the engine could not compile the grammar"))
