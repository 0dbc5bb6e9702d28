"""What comes over a link, bent by atheris: `python -m fuzz_decoder -max_total_time=60`.

Half of the inputs are bytes as they come; the others are bodies in frames with right checksums, so
that they reach the decoders of messages. Whatever it is: it is dropped, it ends the link, or it is
a message.
"""

import sys

import atheris

with atheris.instrument_imports(include=["sagellm.runtime.comm"]):
    from sagellm.runtime.comm import zeromq
    from sagellm.runtime.comm.channel import ChannelClosed, Frame, encode

import msgspec
import trio

from sagellm.runtime.comm.protocol import GraphMessage, WorkerMessage

DECODERS = (zeromq._GRAPH_DECODER, zeromq._WORKER_DECODER)
KNOWN = (GraphMessage, WorkerMessage)


def take(data: bytes) -> None:
    if not data:
        return
    kind, rest = data[0], data[1:]
    link = zeromq.Link(lambda frame: True, DECODERS[kind & 1], 3)
    trio.run(_offer, link, rest if kind & 2 else encode(Frame(3, 0, rest)), KNOWN[kind & 1])


async def _offer(link: "zeromq.Link", data: bytes, known: object) -> None:
    if link.take(data):
        message = await link.receive()
        msgspec.convert(msgspec.to_builtins(message), known)  # type: ignore[call-overload]
        return
    link.close()
    try:
        await link.receive()
    except ChannelClosed:
        return
    raise AssertionError("what was not taken was received")


if __name__ == "__main__":
    zeromq.log = type("Silent", (), {"warning": lambda *given, **fields: None})()
    atheris.Setup(sys.argv, take)
    atheris.Fuzz()
