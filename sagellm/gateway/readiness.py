"""Readiness of a gateway: a probe of each model, then a watch over the graph's health."""

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import anyio

from sagellm.gateway.graph_bridge import GraphBridge
from sagellm.graphs.log import get_logger
from sagellm.runtime.messages import OPERATOR_FAILED, PRIORITIES, SERVED, Request
from sagellm.runtime.sampling import Sampling

LOG = get_logger("sagellm.gateway")

PROBE_S = 5.0  # a probe that takes longer has failed
RETRY_S = 1.0
MAX_RETRY_S = 10.0  # back off if the user's own code fails: each probe then logs a traceback
WATCH_S = 0.1
_ENDED = "the graph ended the probe"
_OWN_FAULT = f"{_ENDED}: failed; "
_NO_PROBE = "the graph failed the probe"


class GraphHealth(Protocol):
    """The fields of a graph's health that the watch reads."""

    @property
    def is_hung(self) -> bool:
        """Whether an engine has work and makes no progress."""

    @property
    def is_stopped(self) -> bool:
        """Whether the graph has stopped."""

    @property
    def missing(self) -> str:
        """A sentence about engines without a serving worker; empty if every engine has one."""


class Readiness:
    """Whether the gateway is ready, and the reason if it is not.

    The gateway becomes ready after a token of each model has passed the whole graph. It stops being
    ready if the graph stops, or if an engine hangs or loses its last worker. `on_change` is called
    after each change. `is_ready` and `reason` may be read from any thread.
    """

    def __init__(self, is_ready: bool = False, reason: str = "starting") -> None:
        self.is_ready = is_ready
        self.reason = reason
        self.on_change: Callable[[], None] = lambda: None

    def change(self, is_ready: bool, reason: str) -> bool:
        """Set both values, and return True. Return False, without effect, if neither changes."""
        before = self.is_ready, self.reason
        self.is_ready, self.reason = is_ready, reason
        if before == (is_ready, reason):
            return False
        self.on_change()
        return True

    async def watch(
        self, bridge: GraphBridge, health: Callable[[], GraphHealth], probes: Sequence["Probe"]
    ) -> None:
        """Probe all models until each has produced a token, then wait for a fault; repeat for ever.

        Must run on the loop of `bridge`. Runs until cancelled.
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
        """Wait until the graph's health has no fault. Until then each fault is the reason."""
        while fault := _fault(health()):
            self._become(False, fault)
            await anyio.sleep(WATCH_S)

    async def _all_probed(self, bridge: GraphBridge, probes: Sequence["Probe"]) -> bool:
        """Probe the models in turn. Return False at the first failure, which becomes the reason."""
        for each in probes:
            if not await self._probed(bridge, each.request()):
                return False
        return True

    async def _probed(self, bridge: GraphBridge, request: Request) -> bool:
        """Send one probe. Return whether the graph answered; a failure becomes the reason."""
        reason = "no token came in time"
        try:
            with anyio.move_on_after(PROBE_S):
                reason = await _answered(bridge, request)
        except Exception as error:  # any failure means that the gateway is not ready
            reason = _NO_PROBE
            if self.reason != reason:
                LOG.error("probe_failed", exc_info=error)
        if reason:
            self._become(False, f"{reason} (model {request.model})" if request.model else reason)
        return not reason

    def _become(self, is_ready: bool, reason: str) -> None:
        if self.change(is_ready, reason):
            (LOG.info if is_ready else LOG.warning)("readiness", is_ready=is_ready, reason=reason)


def _fault(health: GraphHealth) -> str:
    if health.is_stopped:
        return "the graph has stopped"
    return "an engine makes no progress" if health.is_hung else health.missing


async def _next_fault(health: Callable[[], GraphHealth]) -> str:
    """Wait for a fault, and return its description."""
    # Polled, because a hang raises no event.
    while not (fault := _fault(health())):  # noqa: ASYNC110
        await anyio.sleep(WATCH_S)
    return fault


class Probe(NamedTuple):
    """A prompt that asks one model for one token, with the highest priority."""

    token_ids: tuple[int, ...]
    text: str
    model: str = ""

    def request(self) -> Request:
        return Request(
            request_id=f"probe-{secrets.token_hex(8)}",
            prompt=self.text,
            prompt_token_ids=self.token_ids,
            sampling=Sampling(max_tokens=1),
            priority=PRIORITIES["critical"],
            user_id="probe",
            model=self.model,
            tags={"operation": "text_completion"},
        )


async def _answered(bridge: GraphBridge, request: Request) -> str:
    """Send a probe, and return why the graph did not serve it; "" if it served or filtered it."""
    reason = "the graph let no token out"
    async with bridge.open_stream(request) as batches:
        async for events in batches:
            last = events[-1]
            if last.finish_reason in SERVED or last.finish_reason == "filtered":
                return ""
            reason = f"{_ENDED}: {last.finish_reason}"
            if last.code == OPERATOR_FAILED:
                reason += f"; {last.error}"
    return reason
