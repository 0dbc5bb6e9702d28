"""Clients of one stream each: those that read, and those that read nothing."""

import socket
from dataclasses import dataclass, field

import trio
from gateway_served import post
from gateway_session import ServedSession

from sagellm.gateway.settings import Streaming

STALL_S = 1.0  # scaled down from 30 s
STREAMING = Streaming(stall_s=STALL_S)
SEND_BYTES, RECEIVE_BYTES = 8 << 10, 4 << 10  # of the kernel: some 100 events
STEP_S = 0.02
COSTS = {
    "g.device": "null",
    "g.decode_step_s": STEP_S,
    "g.prefill_token_s": 0.0,
    "g.num_blocks": 8192,
    "g.max_num_seqs": 128,
    "generate.max_inflight": 128,
}
ENDLESS, NUM_CHOICES = 1800, 4  # tokens that nobody waits for


def completion(max_tokens: int, num_choices: int = 1) -> bytes:
    body = {"prompt": [1, 2], "max_tokens": max_tokens, "n": num_choices, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return post("/v1/completions", body, "Connection: close")


@dataclass
class Readers:
    """`seconds`: from the request to the end of the answer, of each that read it.

    Leaving the `async with` closes the connections of those that did not read.
    """

    served: ServedSession
    seconds: list[float] = field(default_factory=list)
    slow: list[trio.SocketStream] = field(default_factory=list)

    async def __aenter__(self) -> "Readers":
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self.slow:
            await trio.aclose_forcefully(stream)

    async def read(self, num_tokens: int) -> None:
        started_s, content = trio.current_time(), b""
        async with await self.served.connect() as stream:
            await stream.send_all(completion(num_tokens))
            async for data in stream:
                content += data
        assert b"data: [DONE]" in content
        assert b'"completion_tokens":%d' % num_tokens in content
        self.seconds.append(trio.current_time() - started_s)

    async def stall(self) -> None:
        """Ask, and read nothing."""
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        await sock.connect(("127.0.0.1", self.served.port))
        stream = trio.SocketStream(sock)
        await stream.send_all(completion(ENDLESS, NUM_CHOICES))
        self.slow.append(stream)

    async def run(self, num_readers: int, num_slow: int, num_tokens: int) -> None:
        """Returns once everybody who reads has read all."""
        async with trio.open_nursery() as nursery:
            for _ in range(num_slow):
                nursery.start_soon(self.stall)
            for _ in range(num_readers):
                nursery.start_soon(self.read, num_tokens)

    async def ended(self) -> float:
        """Wait until the server has ended all who do not read; how long that took."""
        started_s = trio.current_time()
        await self.served.session.idle()
        return trio.current_time() - started_s

    async def check_slow(self) -> None:
        """What they got does not end as if it were whole."""
        for stream in self.slow:
            assert b"[DONE]" not in await rest_of(stream)


async def rest_of(stream: trio.SocketStream) -> bytes:
    content = b""
    try:
        async for data in stream:
            content += data
    except trio.BrokenResourceError:
        pass  # cut off
    return content
