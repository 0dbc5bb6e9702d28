"""Shedding: calls are refused before they are read, while the loop is too late to serve them."""

from sagellm.gateway.failure import ApiError
from sagellm.graphs.ir import Graph

# A call takes turns of the loop to be read, encoded, admitted and answered, each as late as the
# last: so many of them.
_NUM_TURNS = 10


def objective_of(graph: Graph | None) -> float | None:
    """The longest time to a first token that the operator has set for all requests.

    None where requests may come in over an `admission` that has no objective: which one a call
    meets is not known before it is read.
    """
    nodes = graph.nodes if graph is not None else ()
    found = [node.attrs.get("slo_ttft_s") for node in nodes if node.op == "admission"]
    known = [float(each) for each in found if isinstance(each, int | float)]
    return max(known) if known and len(known) == len(found) else None


def is_too_late(lag_s: float, objective_s: float | None) -> bool:
    """Whether a call that begins now would miss the objective through the loop alone."""
    return objective_s is not None and _NUM_TURNS * lag_s > objective_s


def shed(lag_s: float, *, should_retry: bool) -> ApiError:
    """The error that the client is told."""
    return ApiError(
        503,
        "the server has too much to do; try again later",
        code="slo_unreachable",
        retry_after_s=max(1.0, _NUM_TURNS * lag_s),
        should_retry=should_retry,
    )
