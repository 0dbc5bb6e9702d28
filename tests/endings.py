"""Answers of refused and failed requests, for tests: their callers get an exception."""

from collections.abc import AsyncIterator, Awaitable

from sagellm import Answer, RequestFailed, RequestRefused
from sagellm.session import Output, Session, Stream, gather


async def ended(asking: Awaitable[Answer]) -> Answer:
    """The answer, also where it is that of a refused or failed request."""
    try:
        return await asking
    except (RequestRefused, RequestFailed) as error:
        return gather([error.end])


async def outputs(stream: Stream) -> AsyncIterator[Output]:
    """All that comes, the end of a refused or failed request too."""
    while batch := await stream.take():
        for output in batch:
            yield output


async def generate(session: Session, *prompt: object, **fields: object) -> Answer:
    """As `session.generate`, which raises where this returns."""
    return await ended(session.generate(*prompt, **fields))  # type: ignore[arg-type]
