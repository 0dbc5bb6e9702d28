"""The refusal of a model that would not be computed right."""


class UnsupportedModel(ValueError):
    """A model configuration that is not built; says the cause, the config field, and a way out."""

    def __init__(self, cause: str, *, field: str, fix: str) -> None:
        self.cause = cause
        self.field = field
        self.fix = fix
        super().__init__(f"config.json, {field}: {cause}; {fix}")
