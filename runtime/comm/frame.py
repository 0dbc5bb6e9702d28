"""Frames: the bytes of one message, with the life that it belongs to, its number and a checksum.

    magic 2 | version 1 | reserved 1 | epoch 4 | number 8 | checksum 4 | body

All numbers are big-endian. The checksum is CRC-32 of all else. `epoch` is the life of the process
that the link leads to: what an earlier life still says is dropped. `number` rises by one a frame,
so that what a link loses, or repeats, is noticed.
"""

import struct
import zlib
from typing import NamedTuple

MAX_FRAME_BYTES = 16 * 2**20  # a prompt of a million tokens fits; KV travels otherwise

_HEADER = struct.Struct(">2sBxIQ")
_CHECKSUM = struct.Struct(">I")
_MAGIC, _VERSION = b"SG", 1
_OVERHEAD = _HEADER.size + _CHECKSUM.size


class FrameError(ValueError):
    """Bytes that are no frame of ours; the message says what is wrong, and shows none of them."""


class Frame(NamedTuple):
    """A frame that came whole; nobody has looked at its body yet."""

    epoch: int
    number: int
    body: bytes


def encode(frame: Frame) -> bytes:
    """Raises FrameError where the body is too long."""
    size = _OVERHEAD + len(frame.body)
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {size} bytes exceeds {MAX_FRAME_BYTES}")
    header = _HEADER.pack(_MAGIC, _VERSION, frame.epoch, frame.number)
    return b"".join((header, _CHECKSUM.pack(_sum(header, frame.body)), frame.body))


def decode(data: bytes) -> Frame:
    """Raises FrameError."""
    if not _OVERHEAD <= len(data) <= MAX_FRAME_BYTES:
        raise FrameError(f"{len(data)} bytes are too few, or too many, for a frame")
    header, body = data[: _HEADER.size], data[_OVERHEAD:]
    magic, version, epoch, number = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise FrameError("it is no frame")
    if version != _VERSION:
        raise FrameError(f"version {version} is not {_VERSION}: both sides must run one release")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != _sum(header, body):
        raise FrameError("its checksum is wrong")
    return Frame(epoch, number, body)


def _sum(header: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(header))
