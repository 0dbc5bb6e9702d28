"""Model folders: finding and checking them, tokenizers, chat templates and weights."""

from dataclasses import dataclass


class ModelError(ValueError):
    """A model that cannot be found or loaded: `cause` names the file or tensor, `fix` the way out.

    `fix` is empty where the cause says it all.
    """

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}" if fix else cause)


@dataclass(frozen=True, slots=True)
class FolderWarning:
    """What may surprise in a folder: the event of the log, the model, what it is, what to do."""

    event: str
    model: str
    cause: str
    fix: str


class TextError(ValueError):
    """A text that the model's own template or tokenizer does not admit."""


class LimitExceeded(TextError):
    """A template or tokenizer that took more than it may.

    `cause` names the limit; it holds nothing of the model or of the text.
    """

    def __init__(self, what: str, limit: str) -> None:
        self.limit = limit
        self.cause = f"the model's {what} {limit}"
        super().__init__(self.cause)


class HelperUnavailable(RuntimeError):
    """No helper process could be started, or it gave no answer in time: try again later."""
