"""What a kernel declares: its ports and options, and how output types follow from input types."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from sagellm.graphs.ir import EdgeType, Node, TensorType, thaw
from sagellm.graphs.vocabulary import OpSpec, Port

TENSOR = "tensor"
KV = "kv"  # the key / value pool as a state: it threads through every kernel that touches it

Types: TypeAlias = dict[str, EdgeType]
Infer: TypeAlias = Callable[[Any, Mapping[str, TensorType]], dict[str, TensorType]]


class ShapeError(ValueError):
    """Input types that a kernel cannot take; the message names the inlet."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: its OpSpec (options type included) and its type rule.

    `infer(options, inlets)` maps the types of the tensor inlets to those of the tensor outlets
    and raises ShapeError. State ports are no concern of it.
    """

    spec: OpSpec
    infer: Infer

    def outlet_types(self, node: Node, inlets: Types) -> Types:
        """The type of each outlet of `node`; a state passes through unchanged."""
        tensors = {name: kind for name, kind in inlets.items() if isinstance(kind, TensorType)}
        found: Types = dict(self.infer(self.options(node), tensors))
        return found | {port.name: KV for port in self.spec.outlets if port.carries == KV}

    def options(self, node: Node) -> Any:
        """The node's attributes as the kernel's option type. Raises msgspec.ValidationError."""
        plain = {key: thaw(value) for key, value in node.attrs.items()}
        return msgspec.convert(plain, self.spec.options)


def kernel(name: str, inlets: str, outlets: str, options: type, infer: Infer) -> Kernel:
    """Declare a kernel. Ports are names separated by blanks; the port `kv` carries the state."""
    spec = OpSpec(name, _ports(inlets), _ports(outlets), options, role="kernel")
    return Kernel(spec, infer)


def _ports(names: str) -> tuple[Port, ...]:
    return tuple(Port(name, KV if name == KV else TENSOR) for name in names.split())


def expect_last(kind: TensorType, size: int, what: str) -> None:
    """Raise ShapeError unless the last dimension of `kind` is `size`."""
    if kind.shape[-1] != size:
        raise ShapeError(f"{what} is {kind}; its last dimension must be {size}")


def expect_same(kinds: Mapping[str, TensorType]) -> TensorType:
    """The one type that all of `kinds` have. Raises ShapeError."""
    first = next(iter(kinds.values()))
    if any(kind != first for kind in kinds.values()):
        shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ShapeError(f"inlets must agree: {shown}")
    return first
