"""As cheap a server of events as Python has: it says `ready PORT`, and serves until it is killed.

python tiny_server.py NUM_EVENTS GAP_S
"""

import sys

import trio

MODELS = b'{"object": "list", "data": [{"id": "tiny"}]}'
CHUNK = (
    b'data: {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", '
    b'"choices": [{"index": 0, "text": " word", "logprobs": null, "finish_reason": %b}]}\n\n'
)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read(stream: trio.SocketStream) -> bytes | None:
    """The head of the next request; its body is skipped. None at the end."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = await stream.receive_some(65536)
        if not part:
            return None
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += await stream.receive_some(65536)
    return head


async def serve(stream: trio.SocketStream) -> None:
    num_events, gap_s = int(sys.argv[1]), float(sys.argv[2])
    while (head := await read(stream)) is not None:
        if head.startswith(b"GET"):
            kind = b"content-type: application/json\r\ncontent-length: %d" % len(MODELS)
            await stream.send_all(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (kind, MODELS))
            continue
        kind = b"content-type: text/event-stream\r\ntransfer-encoding: chunked"
        await stream.send_all(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % kind)
        for _ in range(num_events - 1):
            await stream.send_all(chunked(CHUNK % b"null"))
            await trio.sleep(gap_s)
        last = chunked(CHUNK % b'"length"' + b"data: [DONE]\n\n")
        await stream.send_all(last + b"0\r\n\r\n")


async def main() -> None:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        print("ready", listener.socket.getsockname()[1], flush=True)


if __name__ == "__main__":
    trio.run(main)
