"""Experiments in a core: collects the notes of operators, and counts the outcomes of requests."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.containers import Buckets
from sagellm.runtime.core.effects import Deliver, Faulted, Noted, OperatorFault, Reaction
from sagellm.runtime.core.journal import LogicCell
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.messages import SERVED, Answer, ChoiceKey, TokenEvent
from sagellm.runtime.notes import Assignment, Disagreement, Note
from sagellm.runtime.shadow import Shadowed

# Upper bounds in seconds: those of vLLM's histograms of the two latencies.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_E2E_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
MET, MISSED, WITHOUT_OBJECTIVE, UNSERVED = "met", "missed", "served", "unserved"
ARM = "arm"  # the kind of the notes of `ab_split`


@dataclass(slots=True)
class ExperimentTally:
    """The counts of the notes of one operator with one label.

    `kind`: "arm", or what a shadow decides about. `outcomes`: of the choices that the notes are
    about, each counted once: "met" or "missed" its TTFT objective, "served" without an objective,
    "unserved": it got no token. `gain_s`: the sum over the `num_predicted` disagreements for which
    both decisions were predicted.
    """

    node: str
    kind: str
    label: str
    num_notes: int = 0
    num_predicted: int = 0
    gain_s: float = 0.0
    gain_tokens: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)  # finish reason -> choices
    ttft_s: Buckets = field(default_factory=lambda: Buckets(_TTFT_S))
    e2e_s: Buckets = field(default_factory=lambda: Buckets(_E2E_S))

    def add(self, note: Note) -> None:
        self.num_notes += 1
        if isinstance(note, Disagreement):
            self.gain_tokens += note.gain_tokens
            if note.gain_s is not None:
                self.num_predicted += 1
                self.gain_s += note.gain_s

    def copy(self) -> "ExperimentTally":
        """An independent copy, for readers in another thread."""
        return ExperimentTally(
            self.node,
            self.kind,
            self.label,
            self.num_notes,
            self.num_predicted,
            self.gain_s,
            self.gain_tokens,
            dict(self.outcomes),
            dict(self.ended),
            self.ttft_s.copy(),
            self.e2e_s.copy(),
        )


@dataclass(slots=True)
class _Watched:
    """An open choice that notes are about, and the tallies that count its outcome."""

    arrived_s: float
    slo_ttft_s: float | None
    tallies: dict[tuple[str, str], ExperimentTally] = field(default_factory=dict)
    has_token: bool = False


class Experiments:
    """Turns the notes of operators into effects, after each event, and keeps the tallies.

    A note is in the operator's state until then, so an undone input leaves none.
    """

    def __init__(
        self, cells: Mapping[str, LogicCell], kinds: Mapping[str, str], entries: Container[str]
    ) -> None:
        """`cells`: the operators that take notes. `kinds`: the kind of each. `entries`: the ids of
        the open requests.
        """
        self.tallies: dict[tuple[str, str], ExperimentTally] = {}  # by node and label
        self._cells = cells
        self._kinds = kinds
        self._entries = entries
        self._watched: dict[ChoiceKey, _Watched] = {}
        self._faulty: dict[str, Exception] = {}

    def num_decisions(self, node: str) -> int:
        """The decisions of a live operator that its shadow was compared with."""
        return int(getattr(self._cells[node].state, "num_decisions", 0))

    def fault(self, node: str) -> Exception | None:
        """The error that switched the shadow of an operator off."""
        found: Exception | None = getattr(self._cells[node].state, "fault", None)
        return found

    @property
    def shadows(self) -> dict[str, str]:
        """The operators with a shadow, each with what it decides about."""
        return {
            name: self._kinds[name]
            for name, cell in self._cells.items()
            if isinstance(cell.operator, Shadowed)
        }

    @classmethod
    def of(
        cls, logic_graph: LogicGraph, specs: Mapping[str, OpSpec], entries: Container[str]
    ) -> "Experiments | None":
        """The experiments of a graph; None if no operator takes notes."""
        cells = {
            name: cell
            for name, cell in logic_graph.cells.items()
            if hasattr(cell.initial, "noted") and name in specs
        }
        kinds = {name: specs[name].decides or ARM for name in cells}
        return cls(cells, kinds, entries) if cells else None

    def settle(self, reaction: Reaction) -> None:
        """Add the effects of new notes, and count the outcomes that the event has shown."""
        noted: list[Noted | Faulted] = []
        for node, cell in self._cells.items():
            state = cell.state
            if state.noted:
                cell.state = replace(state, noted=())
                for note in state.noted:
                    noted.append(Noted(node, note))
                    self._watch(node, note)
            fault = getattr(state, "fault", None)
            if fault is not None and self._faulty.get(node) is not fault:
                self._faulty[node] = fault
                noted.append(Faulted(OperatorFault(f"{node}.shadow", fault), ""))
        if self._watched:
            for effect in reaction.effects:
                if type(effect) is Deliver and isinstance(effect.item, TokenEvent | Answer):
                    self._delivered(effect.item, reaction.now)
        for one in noted:
            # A request that has ended in this event gets no further item.
            if isinstance(one, Noted) and one.note.key[0] not in self._entries:
                self._watched.pop(one.note.key, None)
        reaction.effects += noted

    def _watch(self, node: str, note: Note) -> None:
        tally = self.tallies.get((node, note.label))
        if tally is None:
            tally = ExperimentTally(node, self._kinds[node], note.label)
            self.tallies[node, note.label] = tally
        tally.add(note)
        watched = self._watched.get(note.key)
        if watched is None:
            watched = self._watched[note.key] = _Watched(note.arrived_s, note.slo_ttft_s)
        if isinstance(note, Assignment):  # a request that enters again may have another arm
            watched.tallies = {
                place: one for place, one in watched.tallies.items() if place[0] != node
            }
        if watched.slo_ttft_s is None:
            watched.slo_ttft_s = note.slo_ttft_s
        watched.tallies[node, note.label] = tally

    def _delivered(self, item: TokenEvent | Answer, now: float) -> None:
        watched = self._watched.get(item.key)
        if watched is None:
            return
        if item.num_tokens and not watched.has_token:
            watched.has_token = True
            outcome = _outcome(now - watched.arrived_s, watched.slo_ttft_s)
            for tally in watched.tallies.values():
                tally.ttft_s.observe(now - watched.arrived_s)
                tally.outcomes[outcome] = tally.outcomes.get(outcome, 0) + 1
        if item.finish_reason is None:
            return
        del self._watched[item.key]
        for tally in watched.tallies.values():
            tally.ended[item.finish_reason] = tally.ended.get(item.finish_reason, 0) + 1
            if item.finish_reason in SERVED:
                tally.e2e_s.observe(now - watched.arrived_s)
            if not watched.has_token:
                tally.outcomes[UNSERVED] = tally.outcomes.get(UNSERVED, 0) + 1


def _outcome(ttft_s: float, slo_ttft_s: float | None) -> str:
    if slo_ttft_s is None:
        return WITHOUT_OBJECTIVE
    return MET if ttft_s <= slo_ttft_s else MISSED
