"""What goes wrong with a text: the model's own files refuse it, or exceed their limits."""


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
