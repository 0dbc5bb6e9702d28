"""An operator's fault: what a caller is told of it."""

from sagellm.runtime.user_code import WrongResult, name_of


class OperatorFault(Exception):
    """`error` was raised by the operator `node`, or by a function that it called."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(node, error)
        self.node = node
        self.error = error

    @property
    def public(self) -> str:
        """Names operator and type; not the error's text, which may be private."""
        if isinstance(self.error, WrongResult):
            return f"{self.node}: {self.error}"
        return f"{self.node}: the operator raised {name_of(self.error)}"
