"""What is wrong with a model: the error where it cannot be loaded, the warning where it can."""

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
