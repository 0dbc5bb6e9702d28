"""Reads scenarios: YAML files with the load on a graph, the faults to cause, and the checks."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from prometheus_client.core import Metric

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import thaw
from sagellm.graphs.text.tree import read
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.sources import is_shipped_name, shipped_file, suggest_graph

IDENTICAL = "identical"
_COMPARISON = re.compile(
    r"\s*(?P<name>[a-z_:]+)\s*(\{(?P<labels>[^{}]*)\})?\s*"
    r"(?P<sign>==|!=|<=|>=|<|>)\s*(?P<bound>-?\d+(\.\d+)?)\s*"
)
_LABEL = re.compile(r'\s*(?P<name>[a-z_]+)\s*=\s*"?(?P<value>[^",]*)"?\s*')
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `checks`: a comparison of a figure or a metric with a bound."""

    text: str
    name: str
    labels: Mapping[str, str]
    sign: str
    bound: float

    def holds(self, found: float) -> bool:
        return _SIGNS[self.sign](found, self.bound)


def read_check(text: str, figures: Iterable[str]) -> Check:
    """Parse a line of `checks`. Raises ScenarioError.

    `figures`: the names of the report's figures. Any other name must be that of a metric.
    """
    if text == IDENTICAL:
        return Check(text, "num_different", {}, "==", 0.0)
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise ScenarioError(f"check {text!r}: write `identical`, or NAME < NUMBER")
    known = list(figures)
    # Which metrics there are is known only after the run.
    if found["name"] not in known and not found["name"].startswith(("sagellm_", "vllm:")):
        close = nearest(found["name"], known)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
        raise ScenarioError(f"check {text!r}: no figure {found['name']!r}; {hint}")
    labels = [_LABEL.fullmatch(part) for part in (found["labels"] or "").split(",") if part.strip()]
    if None in labels:
        raise ScenarioError(f'check {text!r}: labels are written name="value"')
    named = {label["name"]: label["value"] for label in labels if label is not None}
    return Check(text, found["name"], named, found["sign"], float(found["bound"]))


def metric_value(families: Iterable[Metric], check: Check) -> float | None:
    """The sum of the time series with the name and labels of `check`; None if none matches."""
    values = [  # labels that the check does not name are summed over
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == check.name
        and all(sample.labels.get(name) == value for name, value in check.labels.items())
    ]
    return sum(values) if values else None


_MOST_BYTES = 65_536  # size limit of a scenario's file
_UNKNOWN = re.compile(r"unknown field `(.+?)`")


class ScenarioError(ValueError):
    """The error for a scenario that cannot run. The message has cause, place and fix."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of all mappings in a scenario's file."""


class StreamLoad(_Part, frozen=True, kw_only=True):
    """Streams that start together. Each stream has its own prompt and seed."""

    streams: int = 16
    prompt_tokens: int = 40
    max_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0


class Toxic(_Part, frozen=True, kw_only=True):
    """Faults of a worker's link, in both directions. Times are in seconds.

    Data passes in chunks of at most `chunk_bytes`. Every `reset_every`-th chunk resets the
    connection. In each chunk, one bit is flipped with probability `flip`.
    """

    worker: str
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    chunk_bytes: int = 65_536
    reset_every: int | None = None
    flip: float = 0.0


class FdLimit(_Part, frozen=True, kw_only=True):
    """A limit of open files. `of`: the worker that gets it, or `graph` for the graph's process."""

    of: str = "graph"
    files: int


class Scale(_Part, frozen=True, kw_only=True):
    """A new number of replicas for an engine, like `sagellm scale`."""

    engine: str
    replicas: int


class ScenarioEvent(_Part, frozen=True, kw_only=True):
    """One event. Exactly one of the fields after `for_s` is set: the kind of the event.

    The event happens `at_s` seconds after the start, or when every open stream has at least
    `after_tokens` tokens. An event of a kind in LASTING is undone after `for_s` seconds. Workers
    are named as in logs: `d[0]` is replica 0 of engine d.
    """

    at_s: float | None = None
    after_tokens: int | None = None
    for_s: float | None = None
    load: StreamLoad | None = None
    kill: str | None = None
    sigterm: str | None = None
    stop: str | None = None
    cont: str | None = None
    partition: str | None = None
    toxic: Toxic | None = None
    corrupt: str | None = None
    fd_limit: FdLimit | None = None
    fill_disk: Literal["logs"] | None = None
    clock_jump_s: float | None = None
    drain: str | None = None
    restart: str | None = None
    scale: Scale | None = None

    @property
    def kind(self) -> str:
        return self._kinds[0]

    @property
    def _kinds(self) -> list[str]:
        when = ("at_s", "after_tokens", "for_s")
        names = [name for name in self.__struct_fields__ if name not in when]
        return [name for name in names if getattr(self, name) is not None]

    def mistake(self) -> str | None:
        if len(self._kinds) != 1:
            return f"one thing happens at a time, not {' and '.join(self._kinds) or 'nothing'}"
        if self.at_s is not None and self.after_tokens is not None:
            return "at_s or after_tokens, not both"
        if self.for_s is not None and self.kind not in LASTING:
            return f"{self.kind} does not last: only {', '.join(LASTING)} do"
        return None


LASTING = ("stop", "partition", "toxic", "fd_limit", "fill_disk", "clock_jump_s")


class Scenario(_Part, frozen=True, kw_only=True):
    """A whole scenario. `sagellm_chaos`: the version of the format.

    `graph`: the name of a shipped graph, or a path relative to the scenario's file. `set`:
    overridden options of the graph. `kv_damage`: the share of transferred KV chunks in which one
    bit is flipped. `checks`: lines for `read_check`; the ledger is checked in any case.
    """

    sagellm_chaos: int
    name: str
    graph: str
    set: dict[str, str | int | float | bool | None] = {}
    kv_damage: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    events: tuple[ScenarioEvent, ...]
    checks: tuple[str, ...] = ("identical",)


@dataclass(frozen=True, slots=True)
class LoadedScenario:
    """A scenario and the path of its file."""

    scenario: Scenario
    path: Path

    @property
    def graph(self) -> Path:
        """The file of the graph: a shipped graph, or a file relative to the scenario."""
        name = self.scenario.graph
        return shipped_file(name) if is_shipped_name(name) else self.path.parent / name


def load_scenario(path: Path) -> LoadedScenario:
    """Read and check a scenario. Raises ScenarioError, OSError."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ScenarioError(f"{path}: more than {_MOST_BYTES} bytes")
    try:
        # The YAML reader of graph files is safe: it builds plain values only, of limited size.
        tree = read(content.decode("utf-8-sig"), file=str(path))
        if tree.mistakes:
            raise ScenarioError(f"{path}: {tree.mistakes[0].message}")
        scenario = msgspec.convert(thaw(tree.value), Scenario)
    except UnicodeDecodeError:
        raise ScenarioError(f"{path}: it is not UTF-8") from None
    except GraphError as error:
        raise ScenarioError(f"{path}: {error.diagnostics[0].message}") from None
    except msgspec.ValidationError as error:
        raise ScenarioError(f"{path}: {_explained(str(error))}") from None
    if scenario.sagellm_chaos != 1:  # the version of the format
        raise ScenarioError(f"{path}: this release knows sagellm_chaos: 1")
    is_loaded = False  # whether an earlier event starts streams
    for number, event in enumerate(scenario.events):
        mistake = event.mistake()
        if event.after_tokens is not None and not is_loaded:
            mistake = mistake or "no load begins before it: there would be no tokens"
        if mistake is not None:
            raise ScenarioError(f"{path}: event {number + 1}: {mistake}")
        is_loaded = is_loaded or event.load is not None
    if not is_loaded:
        raise ScenarioError(f"{path}: no event is a load: nothing would be asked of the graph")
    loaded = LoadedScenario(scenario, path)
    if not loaded.graph.is_file():
        cause = f"{path}: graph: {scenario.graph} is no shipped graph, and no file beside it"
        raise ScenarioError(f"{cause}; {suggest_graph(scenario.graph)}")
    return loaded


def _explained(message: str) -> str:
    found = _UNKNOWN.search(message)
    if found is None:
        return message
    known = [
        name
        for part in (ScenarioEvent, Scenario, StreamLoad, Toxic, FdLimit, Scale)
        for name in part.__struct_fields__
    ]
    close = nearest(found[1], known)
    return f"{message}; did you mean {close}?" if close else message
