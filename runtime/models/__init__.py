"""Model folders: finding and checking them, tokenizers, chat templates and weights."""

from dataclasses import dataclass


class ModelError(ValueError):
    """A model cannot be found or loaded. `cause` names the file or tensor. `fix` is an instruction
    for the user, and may be empty.
    """

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}" if fix else cause)


@dataclass(frozen=True, slots=True)
class FolderWarning:
    """A warning about a model folder that is served nevertheless. `event`: the log event's name."""

    event: str
    model: str
    cause: str
    fix: str


class TextError(ValueError):
    """The model's own template or tokenizer refused a text."""


class LimitExceeded(TextError):
    """A template or tokenizer exceeded a limit.

    `cause` names the limit. It is safe to show to clients: it has nothing of the model or the text.
    """

    def __init__(self, what: str, limit: str) -> None:
        self.limit = limit
        self.cause = f"the model's {what} {limit}"
        super().__init__(self.cause)


class HelperUnavailable(RuntimeError):
    """No helper process could be started, or it did not answer in time. A later try may succeed."""
