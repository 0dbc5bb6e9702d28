"""Sandboxes: helper processes with limits, for work that a model's own files define.

A chat template is a program, and a tokenizer.json may act like one. Either can multiply a text
until memory or time runs out. A thread cannot be stopped; a helper process can.
"""

import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Generic, TypeVar

import anyio

from sagellm.graphs.log import get_logger
from sagellm.runtime.models import HelperUnavailable, LimitExceeded, ModelError, TextError
from sagellm.runtime.models.helper_process import (
    AnswerTooLong,
    EncodedTokens,
    Helper,
    HelperDied,
    HelperReady,
    HelperReply,
    HelperSetup,
    RenderedText,
    WorkRefused,
    WorkRequest,
    encode_frame,
)

ANSWER_S = 60.0  # wall time, waiting for a core included: later, the machine is overloaded
_HOLD_S = 0.001  # an event loop blocks for this time: most answers come sooner
MAX_SETUP_BYTES = 192 << 10  # a socket buffers this much before the helper begins to read
MAX_IDLE = 2  # a gateway makes at most this number of calls at a time
_LOG_AGAIN_S = _RETRY_S = 60.0
T = TypeVar("T")
log = get_logger("sagellm.models")


class Sandbox:
    """Runs one job of one model in helper processes, with the function `open_job` of `module`.

    `what`: the job's name in messages ("chat template"). `model`: the folder's name in the log; "":
    nothing is logged. Calls may come from any thread and any event loop. Each running call has a
    helper process of its own, so callers must bound the number of concurrent calls. Raises
    ModelError for a setup that is too long.
    """

    def __init__(self, module: str, setup: HelperSetup, *, what: str, model: str) -> None:
        self._module = module
        self._setup = _checked_size(setup, what, model)
        self._what = what
        self._model = model
        self._lock = threading.Lock()
        self._idle: list[Helper] = []
        self._num_users = 0
        self._ready: HelperReady | None = None
        self._broken: LimitExceeded | None = None  # the job cannot be set up within its limits
        self._broken_s = float("-inf")
        self._logged_s = float("-inf")
        # The finalizer holds this list, not the sandbox: helpers end with an owner that forgot
        # them.
        weakref.finalize(self, _end_all, self._idle)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a helper ready during the `with` block, so that the first call does not wait for a
        process to start.
        """
        with self._lock:
            self._num_users += 1
        try:
            self._replenish()
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                is_last = not self._num_users
            if is_last:
                self.close()

    def close(self) -> None:
        """End idle helpers. A later call starts a helper again."""
        with self._lock:
            # The list object must stay the same, because the finalizer holds it.
            idle, self._idle[:] = tuple(self._idle), ()
        _end_all(list(idle))

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of idle helpers."""
        return tuple(helper.pid for helper in self._idle)

    def ready(self) -> HelperReady:
        """The result of the job's setup. The call blocks the thread until the setup is over. Raises
        the errors of `call`.
        """
        return self._ready if self._ready is not None else _run_blocking(self._set_up())

    async def ready_async(self) -> HelperReady:
        """The same as `ready`, on trio or asyncio."""
        return self._ready if self._ready is not None else await _run_async(self._set_up())

    def call(self, ask: WorkRequest) -> RenderedText | EncodedTokens | WorkRefused:
        """Do one piece of work. The call blocks the thread. Raises LimitExceeded,
        HelperUnavailable, and TextError for a text with a lone surrogate.
        """
        return self._checked(_run_blocking(self._answered(ask, _framed(ask))), ask)

    async def ask(self, ask: WorkRequest) -> RenderedText | EncodedTokens | WorkRefused:
        """The same as `call`, on trio or asyncio. A short request blocks the event loop only
        briefly.

        A cancellation takes effect after the answer, so that the helper stays usable. The limits
        bound the time until then.
        """
        return self._checked(await _run_async(self._answered(ask, _framed(ask))), ask)

    def _checked(
        self, reply: HelperReply, ask: WorkRequest
    ) -> RenderedText | EncodedTokens | WorkRefused:
        if isinstance(reply, AnswerTooLong):
            raise LimitExceeded(self._what, f"made more than {ask.max_answer_bytes >> 10} KiB")
        assert not isinstance(reply, HelperReady)
        return reply

    def _set_up(self) -> Generator[Helper, None, HelperReady]:
        helper = self._take()
        ready = yield from self._guarded(helper, helper.become_ready(), self._setup)
        self._give(helper)
        return ready

    def _answered(self, ask: WorkRequest, data: bytes) -> Generator[Helper, None, HelperReply]:
        helper = self._take()
        yield from self._guarded(helper, helper.become_ready(), self._setup)
        reply = yield from self._guarded(helper, helper.exchange(data), ask)
        self._give(helper)
        return reply

    def _guarded(
        self, helper: Helper, steps: Generator[Helper, None, T], limits: HelperSetup | WorkRequest
    ) -> Generator[Helper, None, T]:
        """Run `steps` on a helper. End the helper if the caller does not wait for their end.

        If the helper dies, raises LimitExceeded with the exceeded limit, or HelperUnavailable.
        """
        is_setup = helper.ready is None
        try:
            found = yield from steps
        except HelperDied as died:
            fault = self._fault(died, limits)
            if is_setup:
                self._broken, self._broken_s = fault, time.monotonic()
            self._report(fault)
            self._replenish()
            raise fault from None
        except BaseException:
            helper.end()
            raise
        if is_setup:
            self._ready = helper.ready
        return found

    def _take(self) -> Helper:
        """Take an idle helper that is alive, or start a new one. Raises HelperUnavailable, and
        LimitExceeded if the setup is broken.
        """
        if self._is_broken:
            assert self._broken is not None
            raise LimitExceeded(self._what, self._broken.limit)
        while True:
            with self._lock:
                helper = self._idle.pop() if self._idle else None
            if helper is None:
                return self._start()
            if helper.is_alive:
                return helper
            helper.end()

    @property
    def _is_broken(self) -> bool:
        """Whether the setup exceeded its limits within the last `_RETRY_S`. After that time it is
        tried again, because the whole machine may have been short of memory.
        """
        return time.monotonic() - self._broken_s < _RETRY_S

    def _start(self) -> Helper:
        try:
            return Helper(self._module, self._setup)
        except OSError as error:
            log.error("model_helper_not_started", model=self._model, cause=str(error))
            raise HelperUnavailable("no helper process could be started") from error

    def _give(self, helper: Helper) -> None:
        """Keep a helper for later calls, or end it if enough are idle."""
        with self._lock:
            if len(self._idle) < MAX_IDLE:
                self._idle.append(helper)
                return
        helper.end()

    def _replenish(self) -> None:
        """Start a helper for the next call if none is idle and a `kept` block is open."""
        if self._num_users and not self._idle and not self._is_broken:
            try:
                self._give(self._start())
            except HelperUnavailable:
                return  # the next call raises the error

    def _fault(self, died: HelperDied, limits: HelperSetup | WorkRequest) -> LimitExceeded:
        """The limit that a dead helper exceeded. Raises HelperUnavailable if the helper ended for
        another reason.
        """
        if died.is_out_of_time:
            limit = f"took more than {limits.cpu_s:.3g} s of CPU time"
        elif died.is_out_of_memory:
            limit = f"took more than {limits.memory_bytes >> 20} MiB of memory"
        elif died.code < 0:
            limit = f"ended its helper process (signal {-died.code})"
        else:
            log.error("model_helper_failed", model=self._model, code=died.code)
            raise HelperUnavailable(f"a helper process ended with code {died.code}")
        return LimitExceeded(self._what, limit)

    def _report(self, fault: LimitExceeded) -> None:
        """Log the fault, at most once a minute: a model with this fault may be called often."""
        now_s = time.monotonic()
        if self._model and now_s - self._logged_s >= _LOG_AGAIN_S:
            self._logged_s = now_s
            log.warning("model_helper_killed", model=self._model, cause=fault.cause)


def _checked_size(setup: HelperSetup, what: str, model: str) -> HelperSetup:
    if (length := len(encode_frame(setup))) > MAX_SETUP_BYTES:
        cause = f"model {model}: its {what} is set up with {length} bytes of text and options"
        raise ModelError(cause, f"at most {MAX_SETUP_BYTES} are taken; see tokenizer_config.json")
    return setup


def _framed(ask: WorkRequest) -> bytes:
    try:
        return encode_frame(ask)
    except UnicodeEncodeError as error:
        raise TextError(f"the prompt is not Unicode text: {error.reason}") from error


class _Exchange(Generic[T]):
    """The steps of an exchange with a helper, and its result."""

    def __init__(self, steps: Generator[Helper, None, T]) -> None:
        self._steps = steps
        self.found: list[T] = []

    def advance(self) -> Helper | None:
        """Run to the next wait. Returns the helper to wait for; None: the result is in `found`."""
        try:
            return next(self._steps)
        except StopIteration as end:
            self.found.append(end.value)
            return None


def _run_blocking(steps: Generator[Helper, None, T]) -> T:
    deadline_s = time.monotonic() + ANSWER_S
    with closing(steps):
        call = _Exchange(steps)
        while helper := call.advance():
            if not helper.is_readable(max(0.0, deadline_s - time.monotonic())):
                raise _late()
        return call.found[0]


async def _run_async(steps: Generator[Helper, None, T]) -> T:
    with closing(steps):
        call = _Exchange(steps)
        helper = call.advance()
        if helper is not None and helper.is_readable(_HOLD_S):
            helper = call.advance()
        if helper is not None:
            await _finish(call, helper)
        return call.found[0]


async def _finish(call: _Exchange[T], helper: Helper | None) -> None:
    with anyio.CancelScope(shield=True), _deadline():
        while helper is not None:
            await anyio.wait_readable(helper)
            helper = call.advance()


@contextmanager
def _deadline() -> Iterator[None]:
    try:
        with anyio.fail_after(ANSWER_S):
            yield
    except TimeoutError:
        raise _late() from None


def _late() -> HelperUnavailable:
    return HelperUnavailable(f"a helper process gave no answer within {ANSWER_S:g} s")


def _end_all(helpers: list[Helper]) -> None:
    for helper in helpers:
        helper.end()
