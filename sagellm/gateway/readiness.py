"""Whether tokens are being produced: a probe through the door, then a watch over the engines."""

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import anyio

from sagellm.gateway.graph_bridge import GraphBridge, GraphRequest
from sagellm.graphs.log import get_logger
from sagellm.runtime.messages import OPERATOR_FAILED, PRIORITIES, SERVED, Sampling

LOG = get_logger("sagellm.gateway")

PROBE_S = 5.0  # a probe that takes longer has failed
RETRY_S = 1.0
MAX_RETRY_S = 10.0  # while code of the user's own fails, which logs a traceback each time
WATCH_S = 0.1
_ENDED = "the graph ended the probe"
_OWN_FAULT = f"{_ENDED}: failed; "
_NO_PROBE = "the graph failed the probe"


class GraphHealth(Protocol):
    """What the watch asks of the graph."""

    @property
    def is_hung(self) -> bool:
        """Whether an engine has work and makes no progress."""

    @property
    def is_stopped(self) -> bool:
        """Whether the graph runs no more."""

    @property
    def missing(self) -> str:
        """Which engines have no worker that serves; empty where each has one."""


class Readiness:
    """True once a token came through the whole graph, until an engine hangs or has no worker left.
    Then again.

    The watch is a task of its own on the loop that `bridge` belongs to; the answers may be read
    from any thread.
    """

    def __init__(self) -> None:
        self.is_ready = False
        self.reason = "starting"
        self.on_change: Callable[[], None] = lambda: None

    async def watch(
        self, bridge: GraphBridge, health: Callable[[], GraphHealth], probes: Sequence["Probe"]
    ) -> None:
        """Probe until a token of each model comes, watch until there is a fault, and again. Never
        returns.
        """
        retry_s = RETRY_S
        while True:
            await self._sound(health)
            before = self.reason
            if await self._all_probed(bridge, probes):
                self._become(True, "")
                self._become(False, await _next_fault(health))
                continue
            is_same = self.reason == before and before.startswith(_OWN_FAULT)
            retry_s = min(2 * retry_s, MAX_RETRY_S) if is_same else RETRY_S
            await anyio.sleep(retry_s)

    async def _sound(self, health: Callable[[], GraphHealth]) -> None:
        """Wait until there is no fault, and say each that there is meanwhile."""
        while fault := _fault(health()):
            self._become(False, fault)
            await anyio.sleep(WATCH_S)

    async def _all_probed(self, bridge: GraphBridge, probes: Sequence["Probe"]) -> bool:
        """One model after the other: what the first lacks is the reason."""
        for each in probes:
            if not await self._probed(bridge, each.entry()):
                return False
        return True

    async def _probed(self, bridge: GraphBridge, entry: GraphRequest) -> bool:
        """Whether the graph answers; what it says instead becomes the reason."""
        reason = "no token came in time"
        try:
            with anyio.move_on_after(PROBE_S):
                reason = await _answered(bridge, entry)
        except Exception as error:  # whatever it is, the gateway is not ready
            reason = _NO_PROBE
            if self.reason != reason:
                LOG.error("probe_failed", exc_info=error)
        if reason:
            self._become(False, f"{reason} (model {entry.model})" if entry.model else reason)
        return not reason

    def _become(self, is_ready: bool, reason: str) -> None:
        before = self.is_ready, self.reason
        self.is_ready, self.reason = is_ready, reason
        if before != (is_ready, reason):
            (LOG.info if is_ready else LOG.warning)("readiness", is_ready=is_ready, reason=reason)
            self.on_change()


def _fault(health: GraphHealth) -> str:
    if health.is_stopped:
        return "the graph has stopped"
    return "an engine makes no progress" if health.is_hung else health.missing


async def _next_fault(health: Callable[[], GraphHealth]) -> str:
    """Wait until there is one. Nothing tells of a hang but that nothing happens: so ask."""
    while not (fault := _fault(health())):  # noqa: ASYNC110
        await anyio.sleep(WATCH_S)
    return fault


class Probe(NamedTuple):
    """A prompt for one model, which is asked for one token before everybody else."""

    token_ids: tuple[int, ...]
    text: str
    model: str = ""

    def entry(self) -> GraphRequest:
        return GraphRequest(
            request_id=f"probe-{secrets.token_hex(8)}",
            text=self.text,
            token_ids=self.token_ids,
            sampling=Sampling(max_tokens=1),
            priority=PRIORITIES["critical"],
            tenant="probe",
            model=self.model,
        )


async def _answered(bridge: GraphBridge, entry: GraphRequest) -> str:
    """Nothing where the graph served the probe, or filtered it out; else why not."""
    reason = "the graph let no token out"
    async with bridge.enter(entry) as batches:
        async for events in batches:
            last = events[-1]
            if last.finish_reason in SERVED or last.finish_reason == "filtered":
                return ""
            reason = f"{_ENDED}: {last.finish_reason}"
            if last.code == OPERATOR_FAILED:
                reason += f"; {last.error}"
    return reason
