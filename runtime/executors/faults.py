"""What the log says of an operator's fault."""

from sagellm.graphs.log import get_logger

log = get_logger("sagellm.executor")


def log_fault(error: Exception, *, node: str, request_id: str) -> None:
    """Where an operator failed, and for which request; never what the request says."""
    log.error(
        "operator_failed",
        node=node,
        request_id=request_id,
        error=type(error).__name__,
        at=_places(error),
    )


def _places(error: Exception) -> list[str]:
    """file:line of each frame, outermost first."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places
