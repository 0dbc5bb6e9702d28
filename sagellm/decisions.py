"""The log of a running graph's decisions, written on request: see `docs/operations.md`."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sagellm.graphs.log import get_logger
from sagellm.graphs.text.codec import to_msgpack
from sagellm.runtime.core.decision_log import DecisionWriter, Header
from sagellm.runtime.core.effects import Effect
from sagellm.runtime.core.events import Event
from sagellm.runtime.executors.tasks import Record
from sagellm.runtime.plan import Plan

log = get_logger("sagellm.decisions")

MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Decisions:
    """Where a graph writes its decisions, and how much at most. The file holds prompts: only its
    owner may read it.
    """

    path: Path
    max_bytes: int = MAX_BYTES


@contextmanager
def recorded(decisions: Decisions | None, plan: Plan, max_hold_s: float) -> Iterator[Record | None]:
    """What an executor calls with each event; None where nothing is to be recorded.

    A full disk ends the log, and nothing else. Raises OSError where the file cannot be written.
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
        block_key=plan.block_key if any(map(plan.reads_cache, plan.engines)) else b"",
    )
    with open(decisions.path, "wb", opener=_private) as file:
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
            self._writer.is_full = True
            log.warning("decisions_not_written", file=self._path, error=str(error))
        else:
            if self._writer.is_full:
                log.warning("decisions_full", file=self._path)


def _private(path: str, flags: int) -> int:
    """Opens a file for its owner alone, also one that was there before."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor
