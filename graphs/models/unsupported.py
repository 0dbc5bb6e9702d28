"""The refusal of a model that would not be computed right."""

_MAX_CHARS = 500  # a value of a config.json has any length


class UnsupportedModel(ValueError):
    """A model configuration that is not built; says the cause, the config field, and a way out."""

    def __init__(self, cause: str, *, field: str, fix: str, file: str = "config.json") -> None:
        self.cause = cause if len(cause) <= _MAX_CHARS else f"{cause[:_MAX_CHARS]}..."
        self.field = field
        self.fix = fix
        self.file = file
        super().__init__(f"{file}, {field}: {self.cause}; {fix}")

    def in_file(self, file: str) -> "UnsupportedModel":
        """The same refusal, with the path of the config.json that it is about."""
        return UnsupportedModel(self.cause, field=self.field, fix=self.fix, file=file)
