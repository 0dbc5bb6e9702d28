"""The decisions that shadows would have made otherwise, from a log, and what is known of their
cost.

The log is given to a new core, with the shadows that its graph had, or with others. A shadow does
not act, so every live decision is as recorded, and each can be compared: a replay with another
policy in charge would only be right until its first difference.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagellm.extensions import RESOLVER
from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import FrozenMap, Graph, freeze, thaw
from sagellm.graphs.rules.option_types import check_options
from sagellm.graphs.rules.rule import Facts
from sagellm.graphs.text.codec import from_msgpack
from sagellm.graphs.vocabulary import SHADOW
from sagellm.opening.decisions import logged_core
from sagellm.opening.sources import override
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import DecisionReader
from sagellm.runtime.core.effects import Noted
from sagellm.runtime.core.events import Event
from sagellm.runtime.core.experiments import ExperimentTally
from sagellm.runtime.messages import SERVED, ChoiceKey
from sagellm.runtime.notes import Disagreement
from sagellm.tracing.critical_path import QUEUE, RequestPath, request_paths


@dataclass(frozen=True, slots=True)
class Difference:
    """One decision that a shadow would have made otherwise. `path`: of the watched choice; None: it
    did not end in the log.
    """

    at_s: float
    node: str
    note: Disagreement
    path: RequestPath | None = None

    @property
    def waited_s(self) -> float | None:
        """For an order: how long the request that the shadow would have sent still waited."""
        if self.path is None or self.note.label != "other first":
            return None
        queued = [phase for phase in self.path.phases if phase.name == QUEUE and not phase.where]
        return max(queued[-1].end_s - self.at_s, 0.0) if queued else 0.0

    @property
    def weight_s(self) -> float:
        """How much the difference matters, as far as that is known in seconds."""
        return max(abs(self.note.gain_s or 0.0), self.waited_s or 0.0)

    @property
    def known(self) -> str:
        """The cost as far as a replay knows it, as a text."""
        note, path = self.note, self.path
        parts = []
        if note.gain_s is not None:
            parts.append(f"predicted first token {shown_gain(note.gain_s)}")
        if note.gain_tokens:
            parts.append(f"{note.gain_tokens:+d} cached tokens")
        if self.waited_s is not None:
            parts.append(f"{note.shadow} waited {self.waited_s * 1e3:.0f} ms more")
        if path is None:
            return ", ".join((*parts, "not ended in the log"))
        if path.ttft_s is not None:
            parts.append(f"TTFT {path.ttft_s * 1e3:.0f} ms{_judged(path.ttft_s, note.slo_ttft_s)}")
        if path.end not in SERVED:
            parts.append(path.end)
        if note.label == "would refuse":
            parts.append(f"{path.num_prompt_tokens} + {path.num_tokens} tokens computed")
        return ", ".join(parts)


def shown_gain(seconds: float) -> str:
    """The time that a decision saves, as a text."""
    return f"{abs(seconds) * 1e3:.0f} ms {'earlier' if seconds >= 0 else 'later'}"


def _judged(ttft_s: float, slo_ttft_s: float | None) -> str:
    return "" if slo_ttft_s is None else ", in time" if ttft_s <= slo_ttft_s else ", late"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The shadow of one operator. `fault`: the error that switched it off; empty: none.

    `is_blind`: it reads prefix blocks, and the log has no reports of them.
    """

    node: str
    kind: str
    num_decisions: int
    fault: str
    is_blind: bool
    tallies: tuple[ExperimentTally, ...]


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """All shadows over a log. `differences`: in the order of the log. `unplayed`: overrides that
    change no decision of an operator, such as those of engines.
    """

    nodes: tuple[NodeReport, ...]
    differences: tuple[Difference, ...]
    is_cut: bool
    unplayed: tuple[str, ...] = ()


def has_shadows(path: Path) -> bool:
    """Whether the graph of a log has shadows. Raises OSError, LogError."""
    with path.open("rb") as file:
        graph = from_msgpack(DecisionReader(file).header.graph)
    return any(SHADOW in node.attrs for node in graph.nodes)


def shadow_report(
    path: Path,
    functions: Mapping[str, Callable[..., Any]],
    overrides: Mapping[str, Any] | None = None,
) -> ShadowReport:
    """Give a log to a core with shadows, and compare every decision.

    `overrides`: options, as "sort.policy", of shadows instead of those of the graph. Raises
    OSError, LogError, and GraphError for wrong options.
    """
    with path.open("rb") as file:
        reader, changes, unplayed = DecisionReader(file), dict[str, Any](), tuple[str, ...]()
        if overrides is not None:
            changes, unplayed = shadow_options(from_msgpack(reader.header.graph), overrides)
        core = logged_core(reader.header, functions, changes)
        found: list[Difference] = []
        paths: dict[ChoiceKey, RequestPath] = {}
        for one in request_paths(_compared(reader, core, found)):
            paths[one.request_id, one.choice] = one
        differences = tuple(
            Difference(one.at_s, one.node, one.note, paths.get(one.note.watched)) for one in found
        )
        has_blocks = bool(reader.header.block_key)
        return ShadowReport(_nodes(core, has_blocks), differences, reader.is_cut, unplayed)


def _compared(
    reader: DecisionReader, core: Core, found: list[Difference]
) -> Iterator[tuple[float, Event, bytes]]:
    """The events of a log; collects the disagreements in the core."""
    for now, event, effects in reader:
        for effect in core.on(event, now):
            if type(effect) is Noted and isinstance(effect.note, Disagreement):
                found.append(Difference(now, effect.node, effect.note))
        yield now, event, effects


def _nodes(core: Core, has_blocks: bool) -> tuple[NodeReport, ...]:
    experiments = core.experiments
    if experiments is None:
        return ()
    return tuple(
        NodeReport(
            node,
            kind,
            experiments.num_decisions(node),
            "" if (fault := experiments.fault(node)) is None else repr(fault),
            "cache" in core.plan.subscribes(node) and not has_blocks,
            tuple(one for one in experiments.tallies.values() if one.node == node),
        )
        for node, kind in experiments.shadows.items()
    )


@dataclass(slots=True)
class _Changes:
    """The shadows that overrides ask for, by operator."""

    shadows: dict[str, dict[str, Any]] = field(default_factory=dict)
    unplayed: list[str] = field(default_factory=list)


def shadow_options(
    graph: Graph, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Overrides of operators as overrides of their shadows, and the targets without one.

    Raises GraphError for unknown names and wrong options.
    """
    override(graph, overrides)  # finds unknown names
    changes, specs = _Changes(), RESOLVER.vocabulary
    for target, value in overrides.items():
        name, _, option = target.partition(".")
        node = graph.node(name) if name in graph.names else None
        if node is None or not specs[node.op].decides:
            changes.unplayed.append(target)
            continue
        whole, _, key = option.partition(".")
        given = changes.shadows.setdefault(name, {})
        before = given.get(whole, thaw(node.attrs.get(whole, FrozenMap())))
        given[whole] = {**before, key: value} if key and isinstance(before, dict) else value
    mistakes: list[Diagnostic] = []
    for name, given in changes.shadows.items():
        options = freeze(given)
        assert isinstance(options, FrozenMap)
        found = check_options((name,), options, specs[graph.node(name).op].options, Facts())
        mistakes += (one for one in found if one.code != "missing-option")
    if mistakes:
        raise GraphError(tuple(mistakes))
    asked = {f"{name}.{SHADOW}": given for name, given in changes.shadows.items()}
    return asked, tuple(changes.unplayed)
