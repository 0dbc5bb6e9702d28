"""A kernel graph as a flat list of instructions, which reuse the registers of dead values."""

from collections.abc import Iterator
from dataclasses import dataclass

from sagellm.graphs.ir import SOURCE, Graph, Node
from sagellm.graphs.kernels import KERNELS, KV, STEP_INPUTS, result_of

Wire = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Instruction:
    """Run `node` on the registers `inputs`, store the results in `outputs`, then free `dead`.

    Inputs and outputs have the order of the kernel's inlets and outlets. The KV state has no output
    register: kernels change the pool in place.
    """

    node: Node
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]

    def __str__(self) -> str:
        left = ", ".join(f"%{register}" for register in self.outputs) or "-"
        right = ", ".join(f"%{register}" for register in self.inputs)
        dropped = "".join(f" drop %{register}" for register in self.dead)
        return f"{left} = {self.node.op}({right})  # {self.node.name}{dropped}"


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """The instructions of a step, and the registers of the step's inputs and of its result.

    `logits`: the register of the logits, or of the vectors of a model that embeds.
    """

    instructions: tuple[Instruction, ...]
    step_inputs: dict[str, int]
    logits: int
    num_registers: int

    def __str__(self) -> str:
        return "\n".join(map(str, self.instructions))


def plan_kernels(graph: Graph) -> KernelPlan:
    """The instructions of a graph in topological order, with allocated registers.

    `graph` must obey the rules of the kernel dialect. Registers of step inputs are never freed.
    """
    registers = _Registers(graph)
    instructions = tuple(registers.instruction(node) for node in graph.topological())
    result = result_of(graph)
    held = registers.held[result.source, result.outlet]
    return KernelPlan(instructions, registers.step_inputs, held, registers.count)


class _Registers:
    """Allocates the register of each wire while instructions are made in order."""

    def __init__(self, graph: Graph) -> None:
        self.step_inputs = {name: index for index, name in enumerate(STEP_INPUTS)}
        self.held: dict[Wire, int] = {(SOURCE, k): v for k, v in self.step_inputs.items()}
        self.count = len(STEP_INPUTS)
        self._free: list[int] = []
        self._feeds = {(e.target, e.inlet): (e.source, e.outlet) for e in graph.edges}
        self._unread: dict[Wire, int] = {}
        for wire in self._feeds.values():
            self._unread[wire] = self._unread.get(wire, 0) + 1

    def instruction(self, node: Node) -> Instruction:
        spec = KERNELS[node.op].spec
        wires = [self._feeds[node.name, port.name] for port in spec.inlets]
        inputs = tuple(self.held[wire] for wire in wires)
        # Outputs are allocated before dead inputs are freed: no result overwrites an input.
        outlets = [port.name for port in spec.outlets if port.carries != KV]
        outputs = tuple(self._take((node.name, outlet)) for outlet in outlets)
        self.held[node.name, KV] = self.step_inputs[KV]  # kernels change it in place
        return Instruction(node, inputs, outputs, tuple(self._drop(wires)))

    def _take(self, wire: Wire) -> int:
        if not self._free:
            self._free.append(self.count)
            self.count += 1
        self.held[wire] = self._free.pop()
        return self.held[wire]

    def _drop(self, wires: list[Wire]) -> Iterator[int]:
        for wire in wires:
            self._unread[wire] -= 1
            if self._unread[wire] == 0 and wire[0] != SOURCE and wire[1] != KV:
                self._free.append(self.held[wire])
                yield self.held[wire]
