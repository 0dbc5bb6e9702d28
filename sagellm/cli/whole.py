"""Whole numbers of the command line: cyclopts alone would take 1.5 for 2."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter, Token


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """Raises ValueError, which is shown with the name of the option."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text} is no whole number") from None


Whole: TypeAlias = Annotated[int, Parameter(converter=_whole, n_tokens=1)]
