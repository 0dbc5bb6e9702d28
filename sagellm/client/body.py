"""The bytes of an answer, as they come over an asynchronous connection."""

from contextlib import suppress

import anyio
import httpx2

from sagellm.client.failure import TRANSPORT, translation

LINGER_S = 1.0  # for a server that has said all, and does not end its answer


class BodyBytes:
    """Read with `next` until None, then `finish`; `aclose` hangs up unless all was read."""

    def __init__(self, response: httpx2.Response, url: str) -> None:
        self._response = response
        self._chunks = response.aiter_bytes()
        self._url = url

    async def next(self) -> bytes | None:
        """What the network brings; None at the end. Raises ClientError."""
        try:  # no context manager: this runs for every event
            return await anext(self._chunks, None)
        except TRANSPORT as error:
            raise translation(error, self._url) from error

    async def finish(self) -> None:
        """Read the little that is left, so that the connection serves another call."""
        with anyio.move_on_after(LINGER_S), suppress(httpx2.HTTPError):
            async for _ in self._chunks:
                pass

    async def aclose(self) -> None:
        """Close the connection first; reading on then ends every generator inside httpx2, of which
        it leaves one to the garbage collector, where trio warns of it.
        """
        await self._response.aclose()
        with suppress(httpx2.HTTPError, httpx2.StreamError):
            async for _ in self._chunks:
                pass

    async def __aenter__(self) -> "BodyBytes":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
