"""The re-entry of requests whose engine was lost, failed on them, or gave them back."""

from msgspec.structs import replace

from sagellm.runtime.core.effects import FailedOn, Reaction
from sagellm.runtime.core.events import EngineFailed, Preempted, Returned
from sagellm.runtime.core.flow import Flow
from sagellm.runtime.core.inputs import InputQueue
from sagellm.runtime.core.preemption import Preemption
from sagellm.runtime.core.request_lifecycle import (
    RequestLifecycle,
    quarantined_event,
    retries_spent_event,
)
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.operator import Arrival, Signal
from sagellm.runtime.plan import Plan

_MAX_REPLICAS = 2  # other replicas that are tried after an engine failed on a request


class Reentry:
    """Lets requests enter again, or ends them, after their engine was lost or failed on them."""

    def __init__(
        self,
        plan: Plan,
        reaction: Reaction,
        lifecycle: RequestLifecycle,
        inputs: InputQueue,
        flow: Flow,
        preemption: Preemption,
    ) -> None:
        self._plan = plan
        self._reaction = reaction
        self._lifecycle = lifecycle
        self._inputs = inputs
        self._flow = flow
        self._preemption = preemption
        self._recovery = lifecycle.recovery

    def enter_again(self, returned: Returned) -> None:
        """Handle a request whose engine was lost: let it resume if `Recovery` allows it.

        `Recovery` may also keep the request for a trial. Otherwise the request ends.
        """
        request, lifecycle = returned.request, self._lifecycle
        if self._is_over(request):
            return
        verdict = self._recovery.judge(returned.node, request, returned.cause)
        if verdict == "now":
            self._enter(returned.node, request)
        elif verdict == "never":
            lifecycle.end(quarantined_event(request, self._reaction.now), None)
        elif verdict == "spent":
            lifecycle.end(retries_spent_event(request, self._reaction.now), None)

    def resume(self, preempted: Preempted) -> None:
        """Let a preempted request enter its queue again, unless it has ended."""
        if not self._is_over(preempted.request):
            self._preemption.returned(preempted.request)
            self._send_again(preempted.node, preempted.request)

    def _is_over(self, request: Request) -> bool:
        """Whether a request must not enter again: a signal has ended it, or it has ended before."""
        register = self._lifecycle.register
        if not register.tombstone(request.request_id) and register.is_open(request.key):
            return False
        self._lifecycle.finish(request)
        return True

    def _send_again(self, node: str, request: Request) -> None:
        """Let a request that left an engine of the operator `node` enter again."""
        # The new epoch makes leases and late events of the earlier engine invalid.
        again = replace(request, epoch=request.epoch + 1, placement={}, num_cached_tokens=0)
        entrance = self._plan.entrance(node)
        if isinstance(entrance, str):
            self._inputs.feed(entrance, Arrival(again))
        else:
            self._flow.emit(0, entrance.source, 0, (again,), entrance.outlet)

    def fail_over(self, failed: EngineFailed, engine: str, num_present: int) -> None:
        """After an engine failed on a request, send the request to a replica that has not tried it.

        If no such replica is present, or `_MAX_REPLICAS` others were tried, the request ends.
        """
        request, lifecycle = failed.request, self._lifecycle
        replica = EngineReplica(engine, failed.replica)
        error = failed.last.error or ""
        self._reaction.effects.append(FailedOn(*replica, request.request_id, error))
        if self._is_over(request):
            return
        avoid = dict.fromkeys((*request.avoid, replica))
        if sum(name == engine for name, _ in avoid) < min(num_present, _MAX_REPLICAS + 1):
            self._enter(failed.node, replace(request, avoid=tuple(avoid)))
        else:
            lifecycle.end(failed.last, None)

    def try_next(self) -> None:
        """Let the next request on trial enter, unless another request is on trial."""
        while (due := self._recovery.next()) is not None:
            self._enter(*due)
            self._inputs.settle()

    def end_waiting(self, signal: Signal) -> None:
        """End the requests that wait for their trial and that a signal concerns."""
        for request in self._recovery.drop(signal.concerns):
            self._lifecycle.finish(request)

    def end_unserved(self, max_hold_s: float) -> None:
        """End the requests that have waited for an engine without replicas for `max_hold_s`."""
        now, lifecycle = self._reaction.now, self._lifecycle
        for request_id, entry in tuple(lifecycle.register.entries.items()):
            for choice in sorted(entry.choices):
                since_s = self._recovery.lost_s((request_id, choice)) or entry.arrived_s
                # A choice that a service operator holds is being served, and does not wait.
                if now - since_s >= max_hold_s and not lifecycle.is_held(request_id, choice):
                    entry.unavailable.add(choice)
                    signal = Signal("cancel", request_id, choice)
                    self.end_waiting(signal)
                    self._inputs.signal(signal)
                    lifecycle.interrupt(signal)
                    self._flow.retry_request(request_id)

    def _enter(self, node: str, request: Request) -> None:
        self._recovery.num_migrated += 1
        self._send_again(node, request)
