"""The `sagellm` command and `python -m sagellm`. Ctrl-C and SIGTERM end the command without a
traceback, even during imports.
"""

import gc
import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143


def command() -> int:
    """Run the command line as the whole process, and return the exit code.

    After an interrupt, the process ends without waiting for threads that import or load.
    """
    ending = _Ending()
    signal.signal(signal.SIGTERM, ending.terminate)
    _load(ending)
    code = main()
    if code != INTERRUPTED:
        return code
    code = ending.code
    signal.signal(signal.SIGINT, ending.leave)  # a second Ctrl-C while libraries shut down
    if threading.active_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


class _Ending:
    """Signal handlers that end the command. SIGTERM calls the current handler of SIGINT, and sets
    the exit code to TERMINATED.
    """

    code = INTERRUPTED

    def terminate(self, number: int, frame: FrameType | None) -> None:
        self.code = TERMINATED
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:  # SIGINT is ignored: a shell starts background commands this way
            self.exit()

    def exit(self, *_: object) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(self.code)

    def leave(self, *_: object) -> None:
        os._exit(self.code)


def _load(ending: _Ending) -> None:
    """Import the modules of the command. During the import, Ctrl-C ends the process at once.

    A KeyboardInterrupt would not do: some libraries catch it during their import. Ending at once is
    safe, because the command has opened nothing yet.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, ending.exit)
    # Imports make no garbage: each collection would visit all of their objects in vain.
    gc.disable()
    import_module("sagellm.cli").load(sys.argv[1:])
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, before)


def main() -> int:
    """Run the command line, and return the exit code."""
    try:
        code: int = import_module("sagellm.cli").main()
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        print("error: interrupted", file=sys.stderr)
        code = INTERRUPTED
    signal.signal(signal.SIGINT, _leave)  # a second Ctrl-C while libraries shut down
    return code


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)


def _is_interrupt(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt is among the causes of `error`.

    Some libraries catch a KeyboardInterrupt, and raise an error of their own.
    """
    found: list[BaseException] = [error]
    for one in found:  # the list grows; each error is visited once, because causes may form a cycle
        inner = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (*inner, one.__cause__ or one.__context__):
            if other is not None and not any(other is known for known in found):
                found.append(other)
    return any(isinstance(one, KeyboardInterrupt) for one in found)


if __name__ == "__main__":
    sys.exit(command())
