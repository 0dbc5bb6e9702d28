"""The error of a model that cannot be found or loaded."""


class ModelError(ValueError):
    """A model that cannot be found or loaded: `cause` names the file or tensor, `fix` the way out.

    `fix` is empty where the cause says it all.
    """

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}" if fix else cause)
