"""What engines of a chain say to each other: a handshake by a shared secret, then frames of raw keys and values.

A connection carries frames one way. Each says which chain, layer and tokens it holds, and is authenticated with a key
of its own, so that a frame which is changed, repeated, left out or from another connection ends the connection. Nothing
is ever unpickled; a length counts only once its header is authentic.
"""

from __future__ import annotations

import hmac
import os
import struct
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

__all__ = [
    "SECRET",
    "VERSION",
    "BrokenFrame",
    "Header",
    "Piece",
    "Refused",
    "Session",
    "Stream",
    "admit",
    "greet",
    "identity",
]

SECRET = "FORERUN_RUNAHEAD_SECRET"  # the environment variable that holds it
VERSION = 1
_MAGIC = b"FRKV"
_HELLO = struct.Struct("!4sH16s32sH")  # magic, version, nonce, model, port
_ANSWER = struct.Struct("!4sHB16s32s")  # magic, version, status, nonce, proof
_HEADER = struct.Struct("!4sBQ16sIQQQ")  # magic, place, sequence, chain, layer, start, end, bytes
_HEADER_MAC, _FRAME_MAC = 16, 16
_STATUSES = ("welcome", "version", "model", "secret")

Reason = Literal["version", "model", "secret", "garbage"]


class Refused(ConnectionError):
    """The handshake failed; `reason` says whose fault it is."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BrokenFrame(ConnectionError):
    """A frame that an honest peer of this connection does not send."""


class Stream(Protocol):
    """Bytes to and from a peer; every call ends in time or raises `OSError`."""

    def read(self, size: int) -> bytes: ...

    def write(self, data: bytes) -> None: ...


class Piece(NamedTuple):
    """Which keys and values: of one chain, in one layer, of tokens from `start` up to `end`."""

    chain: bytes  # 16 bytes
    layer: int
    start: int
    end: int


class Header(NamedTuple):
    """What comes before a frame's payload."""

    piece: Piece
    bytes: int  # of the payload; 0: nothing more of the chain comes
    passed: bool  # the payload comes as a sealed file beside the stream, not in it


def identity(*parts: object) -> bytes:
    """32 bytes that are the same for engines whose keys and values mean the same."""
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=32).digest()


def greet(stream: Stream, secret: bytes, model: bytes, port: int = 0) -> Session:
    """The sender's half of the handshake; it says at which port it listens itself.

    Raises:
        Refused: The peer has another version, model or secret, or speaks something else.
    """
    nonce = os.urandom(16)
    stream.write(_HELLO.pack(_MAGIC, VERSION, nonce, model, port))
    magic, version, status, other, proof = _ANSWER.unpack(stream.read(_ANSWER.size))
    if magic != _MAGIC or status >= len(_STATUSES):
        raise Refused("garbage", "the peer does not speak forerun's protocol")
    if version != VERSION or status == _STATUSES.index("version"):
        raise Refused("version", f"the peer speaks version {version} of the protocol; expected {VERSION}")
    if status == _STATUSES.index("model"):
        raise Refused("model", "the peer serves another model, or keeps its cache another way")
    said = nonce + other + model + port.to_bytes(2)
    if not hmac.compare_digest(proof, _proof(secret, b"receiver", said)):
        raise Refused("secret", "the peer has another secret")
    stream.write(_proof(secret, b"sender", said))
    if stream.read(1) != b"\0":
        raise Refused("secret", "the peer does not accept this engine's secret")
    return Session(_proof(secret, b"session", said))


def admit(stream: Stream, secret: bytes, model: bytes) -> Session:
    """The receiver's half of the handshake.

    Raises:
        Refused: As `greet`; the peer has been told why unless it speaks something else.
    """
    magic, version, other, theirs, port = _HELLO.unpack(stream.read(_HELLO.size))
    if magic != _MAGIC:
        raise Refused("garbage", "the peer does not speak forerun's protocol")
    nonce = os.urandom(16)

    def answer(status: str, proof: bytes = bytes(32)) -> None:
        stream.write(_ANSWER.pack(_MAGIC, VERSION, _STATUSES.index(status), nonce, proof))

    if version != VERSION:
        answer("version")
        raise Refused("version", f"the peer speaks version {version} of the protocol; expected {VERSION}")
    if not hmac.compare_digest(theirs, model):
        answer("model")
        raise Refused("model", "the peer serves another model, or keeps its cache another way")
    said = other + nonce + model + port.to_bytes(2)
    answer("welcome", _proof(secret, b"receiver", said))
    if not hmac.compare_digest(stream.read(32), _proof(secret, b"sender", said)):
        stream.write(b"\1")
        raise Refused("secret", "the peer has another secret")
    stream.write(b"\0")
    return Session(_proof(secret, b"session", said), port)


class Session:
    """One connection after its handshake: authenticates frames, in order.

    A frame without payload, of the tokens from 0 up to 0, says that nothing more of its chain comes.
    """

    header_size = _HEADER.size + _HEADER_MAC
    mac_size = _FRAME_MAC

    def __init__(self, key: bytes, port: int = 0) -> None:
        self.port = port  # at which the sender listens itself
        self._key = key
        self._sequence = 0
        self._opened = b""  # the header that `check` belongs to

    def seal(self, piece: Piece, payload: memoryview, *, passed: bool) -> tuple[bytes, bytes]:
        """The next frame's header, and what follows its payload (nothing where the payload is passed beside)."""
        header = _HEADER.pack(_MAGIC, passed, self._sequence, *piece, payload.nbytes)
        mac = b"" if passed else self._tag(header, payload).finalize()
        self._sequence += 1
        return header + self._header_mac(header), mac

    def open(self, data: bytes, limit: int) -> Header:
        """Reads the next frame's header; its payload may be believed after `check`.

        Raises:
            BrokenFrame: It is not authentic, not the next one, or announces more bytes than the limit.
        """
        header, mac = data[: _HEADER.size], data[_HEADER.size :]
        if not hmac.compare_digest(mac, self._header_mac(header)):
            raise BrokenFrame("a frame's header is not authentic")
        magic, passed, sequence, chain, layer, start, end, size = _HEADER.unpack(header)
        if magic != _MAGIC or sequence != self._sequence:
            raise BrokenFrame(f"frame {sequence} came; expected frame {self._sequence}")
        is_last = (passed, start, end, size) == (False, 0, 0, 0)
        if not is_last and not (0 < size <= limit and start < end):
            raise BrokenFrame(f"a frame of {size} bytes for tokens {start} to {end}; expected 1 to {limit} bytes")
        self._opened = header
        if passed:
            self._sequence += 1
        return Header(Piece(chain, layer, start, end), size, bool(passed))

    def check(self, payload: memoryview, mac: bytes) -> None:
        """Returns if the payload of the header opened last is authentic.

        Raises:
            BrokenFrame: It is not.
        """
        try:
            self._tag(self._opened, payload).verify(mac)
        except InvalidSignature:
            raise BrokenFrame("a frame's payload is not authentic") from None
        self._sequence += 1

    def _header_mac(self, header: bytes) -> bytes:
        return blake2b(header, key=self._key, digest_size=_HEADER_MAC).digest()

    def _tag(self, header: bytes, payload: memoryview) -> Poly1305:
        # Poly1305 is as fast as memory, and wants a key of its own for every message.
        tag = Poly1305(blake2b(self._sequence.to_bytes(8), key=self._key, person=b"frame", digest_size=32).digest())
        tag.update(header)
        tag.update(payload)
        return tag


def _proof(secret: bytes, who: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, who + b"\0" + VERSION.to_bytes(2) + said, "sha256")
