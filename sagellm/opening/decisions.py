"""The decision log of a graph: written while the graph runs, and replayed later.

A replay gives the logged events to a new core and compares its effects with the logged effects: see
`docs/operations.md`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sagellm.extensions import RESOLVER
from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger
from sagellm.graphs.text.codec import from_msgpack, to_msgpack
from sagellm.opening.sources import override, with_outlet_names
from sagellm.opening.tokenizers import load_models
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import (
    DecisionReader,
    DecisionWriter,
    Header,
    are_same,
    encode_effects,
    shown_effects,
)
from sagellm.runtime.core.effects import Effect
from sagellm.runtime.core.events import Event
from sagellm.runtime.executors.tasks import RecordDecision
from sagellm.runtime.operator import EncodeText
from sagellm.runtime.plan import Plan, plan

log = get_logger("sagellm.decisions")

MAX_DECISION_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class DecisionFile:
    """The file of a decision log, which ends at `max_bytes`.

    The file contains prompts, so only its owner may read it.
    """

    path: Path
    max_bytes: int = MAX_DECISION_BYTES


@contextmanager
def recording(
    decisions: DecisionFile | None, plan: Plan, max_hold_s: float
) -> Iterator[RecordDecision | None]:
    """Open the log, and yield the function that an executor calls with each event.

    Yields None if `decisions` is None. A full disk ends the log, but not the graph. Raises OSError
    for a file that cannot be opened. Leaving the block closes the file.
    """
    if decisions is None:
        yield None
        return
    header = Header(
        graph=to_msgpack(plan.graph),
        engines=dict(plan.engines),
        seed=plan.seed,
        max_hold_s=None if math.isinf(max_hold_s) else max_hold_s,
        facts=dict(plan.facts),
        # Routers that read the cache compare prefix hashes: a replay needs the same hash key.
        block_key=plan.block_key if any(map(plan.reads_cache, plan.engines)) else b"",
    )
    with open(decisions.path, "wb", opener=_open_private) as file:
        writer = DecisionWriter(file, header, decisions.max_bytes)
        yield _Recorder(writer, decisions.path)


class _Recorder:
    def __init__(self, writer: DecisionWriter, path: Path) -> None:
        self._writer = writer
        self._path = str(path)

    def __call__(self, now: float, event: Event, effects: list[Effect]) -> None:
        if self._writer.is_full:
            return
        try:
            self._writer.record(now, event, effects)
        except OSError as error:
            # One failure ends the log: after a missing event, a replay is meaningless.
            self._writer.is_full = True
            log.warning("decisions_not_written", file=self._path, error=str(error))
        else:
            if self._writer.is_full:
                log.warning("decisions_full", file=self._path)


def _open_private(path: str, flags: int) -> int:
    """Open a file that only its owner may read, even if the file existed with other rights."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # the mode of `open` has no effect on an existing file
    return descriptor


@dataclass(frozen=True, slots=True)
class ReplayDifference:
    """The first event whose replayed effects differ from the logged ones. `number` begins at 1."""

    number: int
    now_s: float
    event: Event
    recorded: list[Any]
    replayed: list[Any]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay. `is_cut`: whether the log ends before its graph ended."""

    num_events: int
    num_effects: int
    is_cut: bool
    difference: ReplayDifference | None = None


def replay(
    path: Path,
    *,
    functions: Mapping[str, Callable[..., Any]],
    overrides: Mapping[str, Any] | None = None,
) -> ReplayResult:
    """Replay a log up to the first difference. `overrides` change options of the logged graph.

    Raises OSError, LogError for a file that is no log, and GraphError for wrong overrides and for
    functions that are not registered.
    """
    with open(path, "rb") as file:
        reader = DecisionReader(file)
        core = logged_core(reader.header, functions, overrides or {})
        num_events = num_effects = 0
        for now, event, recorded in reader:
            effects = core.on(event, now)
            num_events += 1
            num_effects += len(effects)
            replayed = encode_effects(effects)
            if replayed == recorded:
                continue
            found = shown_effects(recorded), shown_effects(replayed)
            if not are_same(*found):
                difference = ReplayDifference(num_events, now, event, *found)
                return ReplayResult(num_events, num_effects, reader.is_cut, difference)
        return ReplayResult(num_events, num_effects, reader.is_cut)


def logged_core(
    header: Header, functions: Mapping[str, Callable[..., Any]], overrides: Mapping[str, Any]
) -> Core:
    """A new core of a logged graph, with changed options. Raises GraphError."""
    graph = override(from_msgpack(header.graph), overrides)
    graph = with_outlet_names(graph, RESOLVER.vocabulary)  # older logs have aliases
    ready = plan(
        graph,
        RESOLVER,
        header.engines,
        functions=functions,
        encode=_encoder(graph),
        seed=header.seed,
        facts=header.facts,
        block_key=header.block_key or None,
    )
    hold_s = math.inf if header.max_hold_s is None else header.max_hold_s
    return Core(ready, max_hold_s=hold_s)


def _encoder(graph: Graph) -> EncodeText:
    """The encoder of the graph's models. Its first call loads them: most replays encode nothing."""
    models = cache(lambda: load_models(graph))
    return lambda text, model: models().encode(text, model)
