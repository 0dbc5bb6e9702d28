"""The declaration of a kernel: its inlets, outlets and options, and the types of its outlets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from sagellm.graphs.ir import EdgeType, Node, TensorType, thaw
from sagellm.graphs.vocabulary import OpSpec, Port

TENSOR = "tensor"
KV = "kv"  # the KV pool as a state: its edges lead from kernel to kernel in the order of access

Types: TypeAlias = dict[str, EdgeType]
Infer: TypeAlias = Callable[[Any, Mapping[str, TensorType]], dict[str, TensorType]]


class ShapeError(ValueError):
    """A kernel does not accept the types of its inlets. The message names the inlet."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: its OpSpec, which has the type of its options, and its type rule.

    `infer(options, inlets)` maps the types of tensor inlets to the types of tensor outlets, without
    the KV state. It raises ShapeError.
    """

    spec: OpSpec
    infer: Infer

    def outlet_types(self, node: Node, inlets: Types) -> Types:
        """The type of each outlet of `node`. The KV state passes through. Raises ShapeError."""
        tensors = {name: kind for name, kind in inlets.items() if isinstance(kind, TensorType)}
        found: Types = dict(self.infer(self.options(node), tensors))
        return found | {port.name: KV for port in self.spec.outlets if port.carries == KV}

    def options(self, node: Node) -> Any:
        """Convert the attributes of a node to options. Raises msgspec.ValidationError."""
        plain = {key: thaw(value) for key, value in node.attrs.items()}
        return msgspec.convert(plain, self.spec.options)


def kernel(name: str, inlets: str, outlets: str, options: type, infer: Infer) -> Kernel:
    """Declare a kernel. `inlets` and `outlets`: names separated by blanks; `kv` is the KV state."""
    spec = OpSpec(name, _ports(inlets), _ports(outlets), options, role="kernel")
    return Kernel(spec, infer)


def _ports(names: str) -> tuple[Port, ...]:
    return tuple(Port(name, KV if name == KV else TENSOR) for name in names.split())


def expect_last(kind: TensorType, size: int, what: str) -> None:
    """Raise ShapeError unless the last dimension of `kind` is `size`."""
    if kind.shape[-1] != size:
        raise ShapeError(f"{what} is {kind}; its last dimension must be {size}")


def expect_same(kinds: Mapping[str, TensorType]) -> TensorType:
    """The common type of `kinds`. Raises ShapeError if two types differ."""
    first = next(iter(kinds.values()))
    if any(kind != first for kind in kinds.values()):
        shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ShapeError(f"inlets must agree: {shown}")
    return first
