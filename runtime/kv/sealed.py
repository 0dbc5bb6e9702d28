"""Seals: what only a holder of a key can put on bytes (AES-GMAC, tens of gigabytes a second)."""

import hashlib
import hmac
import struct
from collections.abc import Iterable

from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

KEY_BYTES = 32
SALT_BYTES = 16
SEAL_BYTES = 16

_NONCE = struct.Struct(">8xI")
_TO_SERVER = 1 << 31  # so that the sides of a connection never use one number


class Seal:
    """One seal in the making."""

    def __init__(self, encryptor: AEADEncryptionContext) -> None:
        self._encryptor = encryptor

    def add(self, parts: Iterable[bytes | memoryview]) -> None:
        for part in parts:
            self._encryptor.authenticate_additional_data(part)

    def end(self) -> bytes:
        self._encryptor.finalize()
        return self._encryptor.tag


class Sealer:
    """Seals one direction of one connection; each seal has a number of its own.

    The connection has a key of its own, made of both sides' salts: as each draws its salt anew, no
    number is used twice with a key, whatever the other side, or who stands between, says.
    """

    def __init__(self, key: bytes, salts: bytes, *, to_server: bool) -> None:
        self._key = AES(hashlib.blake2b(salts, key=key, digest_size=KEY_BYTES).digest())
        self._number = _TO_SERVER if to_server else 0

    def begin(self) -> "Seal":
        """The seal of the next thing that is said, which is given to it bit by bit."""
        nonce = _NONCE.pack(self._number)
        self._number += 1
        return Seal(Cipher(self._key, GCM(nonce)).encryptor())

    def seal(self, parts: Iterable[bytes | memoryview]) -> bytes:
        """The seal of the next thing that is said."""
        seal = self.begin()
        seal.add(parts)
        return seal.end()

    def is_sealed(self, seal: bytes, parts: Iterable[bytes | memoryview]) -> bool:
        """Whether the next thing that was heard came with its seal."""
        return hmac.compare_digest(self.seal(parts), seal)
