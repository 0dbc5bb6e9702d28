"""The `sagellm` command, and `python -m sagellm`: Ctrl-C and SIGTERM end it quietly, also while it
imports.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143


def command() -> int:
    """Run the command line in a process of its own; returns the exit code.

    After an interrupt, a thread that still imports or loads is not waited for.
    """
    ending = _Ending()
    signal.signal(signal.SIGTERM, ending.terminate)
    _load(ending)
    code = main()
    if code != INTERRUPTED:
        return code
    code = ending.code
    signal.signal(signal.SIGINT, ending.leave)  # while threads and libraries end
    if threading.active_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


class _Ending:
    """How the command is ended from outside: a SIGTERM is handled as Ctrl-C is, wherever that comes
    just then, and remembered.
    """

    code = INTERRUPTED

    def terminate(self, number: int, frame: FrameType | None) -> None:
        self.code = TERMINATED
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:  # Ctrl-C is ignored here, as in a script's background
            self.exit()

    def exit(self, *_: object) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(self.code)

    def leave(self, *_: object) -> None:
        os._exit(self.code)


def _load(ending: _Ending) -> None:
    """Import what the command needs. Nothing is open yet, so that Ctrl-C may end the process here.

    A KeyboardInterrupt would not do: some libraries catch it while they are imported.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, ending.exit)
    import_module("sagellm.cli").load(sys.argv[1:])
    signal.signal(signal.SIGINT, before)


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        code: int = import_module("sagellm.cli").main()
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        print("error: interrupted", file=sys.stderr)
        code = INTERRUPTED
    signal.signal(signal.SIGINT, _leave)  # while threads and libraries end
    return code


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)


def _is_interrupt(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt led to an error: some libraries turn it into one of theirs."""
    found: list[BaseException] = [error]
    for one in found:  # grows: causes may form a cycle, so each is looked at once
        inner = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (*inner, one.__cause__ or one.__context__):
            if other is not None and not any(other is known for known in found):
                found.append(other)
    return any(isinstance(one, KeyboardInterrupt) for one in found)


if __name__ == "__main__":
    sys.exit(command())
