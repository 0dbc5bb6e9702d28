"""Where in a user's own files an error was raised."""

import sysconfig
import traceback
from pathlib import Path

_OURS = str(Path(__file__).resolve().parent.parent)
_FOREIGN = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")
)


def line_of(error: BaseException) -> tuple[str, int] | None:
    """The file and line of a user's code at fault: that of a SyntaxError, or else the innermost
    frame outside of sagellm, the standard library and installed packages. None where there is none.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return error.filename, error.lineno
    frames = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return next((place for place in reversed(frames) if _is_users(place[0])), None)


def told_with_line(error: BaseException) -> str:
    """Type, text and place of an error: `NameError: name 'x' is not defined (guard.py:3)`."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    at = line_of(error)
    return f"{named} ({at[0]}:{at[1]})" if at else named


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    path = str(Path(file).resolve())
    return not path.startswith((_OURS + "/", *(f"{folder}/" for folder in _FOREIGN)))
