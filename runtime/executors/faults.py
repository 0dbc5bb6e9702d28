"""The log of operators' faults."""

from sagellm.graphs.log import get_logger
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.user_code import name_of, place_of, traceback_of

log = get_logger("sagellm.executor")


def log_fault(fault: OperatorFault, *, request_id: str) -> None:
    """Log where an operator failed, and for which request.

    An error of the user's own code is logged with its text and traceback: the code is the user's to
    correct. Any other error is logged without its text, which may hold what a request says.
    """
    error = fault.error
    said = {"node": fault.node, "request_id": request_id, "error": name_of(error)}
    own = traceback_of(error)
    if own is None:
        log.error("operator_failed", **said, at=_places(error))
    else:
        log.error("operator_failed", **said, at=place_of(error), exception=own)


def _places(error: Exception) -> list[str]:
    """file:line of each frame, outermost first."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places
