"""The resolver: finds the code of an operator by its name."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from sagellm.graphs.vocabulary import OpSpec, Vocabulary, nearest
from sagellm.runtime.operator import Build, OperatorModule
from sagellm.runtime.registry import Registry, check_callable


class UnknownOperator(LookupError):
    """No operator has the requested name."""


class ShippedOperators(Mapping[str, OperatorModule]):
    """The operators in `sagellm.operators`, by name; each is imported at its first look-up."""

    def __init__(self) -> None:
        self._loaded: dict[str, OperatorModule] = {}

    def __getitem__(self, name: str) -> OperatorModule:
        if name not in self._loaded:
            if name not in self._names:
                raise KeyError(name)
            module = importlib.import_module(f"sagellm.operators.{name}")
            self._loaded[name] = read_module(name, module)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        package = importlib.import_module("sagellm.operators")
        return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg))


def read_module(name: str, module: Any) -> OperatorModule:
    """The operator that a module defines with `SPEC` and `build`; any object with both will do.

    Raises TypeError, and ValueError if the name in SPEC is not `name`.
    """
    spec, build = getattr(module, "SPEC", None), getattr(module, "build", None)
    if not isinstance(spec, OpSpec) or build is None:
        raise TypeError("an operator is a module with SPEC, an OpSpec, and build")
    if spec.name != name:
        raise ValueError(f"its SPEC is called {spec.name!r}, not {name!r}")
    return checked_operator(OperatorModule(spec, build))


def checked_operator(module: OperatorModule) -> OperatorModule:
    """Return the operator. Raises TypeError if a part has the wrong type."""
    if not isinstance(module.spec, OpSpec):
        raise TypeError(f"spec must be an OpSpec, not {type(module.spec).__name__}")
    check_callable("build", module.build)
    _ = module.spec.option_types  # raises TypeError if the options are no dataclass
    return module


class _Specs(Vocabulary):
    """The specs of all operators. A look-up imports only the operator of that name."""

    def __init__(self, operators: Registry[OperatorModule]) -> None:
        super().__init__({})
        self._operators = operators

    def __getitem__(self, name: str) -> OpSpec:
        return self._operators[name].spec

    def __contains__(self, name: object) -> bool:
        return name in self._operators

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __len__(self) -> int:
        return len(self._operators)


class Resolver:
    """Finds operators by name: shipped, registered, or from entry points `sagellm.operators`.

    The shipped operator `prefill` is the module `sagellm.operators.prefill`.
    """

    def __init__(self, registered: Mapping[str, OperatorModule] | None = None) -> None:
        self._operators = Registry("operator", "sagellm.operators", ShippedOperators(), read_module)
        for name, module in (registered or {}).items():
            self._operators.register(name, module)

    def register(self, spec: OpSpec, build: Build) -> None:
        """Register an operator under the name in its spec.

        Raises ValueError if the name is taken, TypeError if a part has the wrong type.
        """
        self._operators.register(spec.name, checked_operator(OperatorModule(spec, build)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._operators)

    def operator(self, name: str) -> OperatorModule:
        """The operator with a name. Raises UnknownOperator, BrokenEntryPoint."""
        if name not in self._operators:
            close = nearest(name, self.names)
            raise UnknownOperator(f"no operator {name!r}; did you mean {close!r}?")
        return self._operators[name]

    @property
    def vocabulary(self) -> Vocabulary:
        """The specs of all operators."""
        return _Specs(self._operators)
