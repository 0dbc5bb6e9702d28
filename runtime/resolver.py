"""The resolver: the one place where a name in a graph reaches code."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from sagellm.graphs.vocabulary import OpSpec, Vocabulary, nearest
from sagellm.runtime.operator import Build, OperatorModule


class UnknownOperator(LookupError):
    """No operator has that name."""


class Resolver:
    """Finds `op: prefill` in `sagellm.operators.prefill`, and operators that a user registered."""

    def __init__(self, registered: Mapping[str, OperatorModule] | None = None) -> None:
        self._registered = dict(registered or {})
        self._loaded: dict[str, OperatorModule] = {}

    def register(self, spec: OpSpec, build: Build) -> None:
        """Add an operator. Raises ValueError where the name is taken."""
        if spec.name in self.names:
            raise ValueError(f"operator {spec.name!r} exists already; choose another name")
        self._registered[spec.name] = OperatorModule(spec, build)

    @property
    def names(self) -> tuple[str, ...]:
        package = importlib.import_module("sagellm.operators")
        shipped = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg]
        return (*sorted(shipped), *self._registered)

    def operator(self, name: str) -> OperatorModule:
        """The operator of that name. Raises UnknownOperator with the nearest one."""
        if name in self._registered:
            return self._registered[name]
        if name not in self._loaded:
            if name not in self.names:
                close = nearest(name, self.names)
                raise UnknownOperator(f"no operator {name!r}; did you mean {close!r}?")
            module: Any = importlib.import_module(f"sagellm.operators.{name}")
            self._loaded[name] = OperatorModule(module.SPEC, module.build)
        return self._loaded[name]

    @property
    def vocabulary(self) -> Vocabulary:
        """The specs of all operators."""
        return Vocabulary({name: self.operator(name).spec for name in self.names})
