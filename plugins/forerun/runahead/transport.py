"""Carries keys and values from an engine to the next: TCP anywhere, files in memory between engines of one host.

A receiver listens on a TCP address, and for engines of its own host on a local socket of the same name, over which a
payload is passed as a sealed file in memory, and so copied once. A broken connection loses what was under way; nobody
asks for it again, as the engine that lacks it computes it instead.

Not over `torch.distributed`: engines started apart share no group, and one made for them would not keep what is
promised here. A receive that is not answered in time closes all pairs of a gloo group's rank, also those with engines
that are well, and no rank comes back without a new group of all (tests/runahead/test_gloo.py); nor are the members of a
group, or what they send, authenticated. A group of two for each neighbour would be sockets again, without the check.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forerun.runahead.mailbox import Arrival, Mailbox
from forerun.runahead.stream import SocketStream, passed_file, read_passed
from forerun.runahead.wire import BrokenFrame, Piece, Refused, Session, admit, greet

__all__ = ["Address", "Peer", "Receiver", "Sender", "parse_address"]

_logger = logging.getLogger(__name__)
_BACKOFF = (0.05, 2.0)  # seconds before another try, at first and at most
_HANDSHAKE = 5.0  # seconds
_CONNECTIONS = 64  # at a time
_CHAINS = 64  # the latest of a connection, which break off with it

Address = tuple[str, int]


@dataclass(frozen=True)
class Peer:
    """What engines of a chain must agree on, and what they grant each other.

    Args:
        secret: Known to the chain's engines alone.
        model: From `forerun.runahead.wire.identity`.
        timeout: Seconds for one frame to pass once it has begun (and one more for each megabyte), or to wait its turn.
        limit: Bytes of one frame's payload.
        capacity: Bytes that wait to be sent, or to be taken.

    Raises:
        ValueError: The secret is empty.
    """

    secret: bytes
    model: bytes
    timeout: float = 10.0
    limit: int = 1 << 30
    capacity: int = 4 << 30

    def __post_init__(self) -> None:
        if not self.secret:
            raise ValueError("the secret is empty; expected one that the chain's engines alone know")


def parse_address(text: str) -> Address:
    """Reads "host:port".

    Raises:
        ValueError: It is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is no address; expected host:port")
    return host.strip("[]"), int(port)


class Receiver:
    """Takes frames from any number of engines into a mailbox; what a hostile or broken peer sends is counted.

    Args:
        address: To listen on; port 0: any free one. Loopback unless told otherwise.
        peer: What is expected of them.

    Raises:
        OSError: The address is taken, or not this host's.
    """

    def __init__(self, peer: Peer, address: Address = ("127.0.0.1", 0)) -> None:
        self._peer = peer
        self.mailbox = Mailbox(peer.capacity, 10 * peer.timeout)
        self.refused: Counter[str] = Counter()  # by reason
        self.bytes = 0
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        tcp = socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.address: Address = tcp.getsockname()[:2]
        self._listeners = [tcp]
        try:
            local = socket.socket(socket.AF_UNIX)
            self._listeners.append(local)
            local.bind(_local_name(self.address))
            local.listen()
        except OSError:
            self.close()
            raise
        self._threads = [
            threading.Thread(target=self._accept, args=(listener,), daemon=True, name="runahead-accept")
            for listener in self._listeners
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends every connection; the address is free afterwards."""
        self._closed.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                if not self._closed.wait(0.05):  # such as too many open files: it may pass
                    continue
                return
            if not self._slots.acquire(blocking=False):
                self.refused["connections"] += 1
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="runahead-receive").start()

    def _serve(self, connection: socket.socket) -> None:
        stream = SocketStream(connection, _HANDSHAKE)
        chains: deque[bytes] = deque(maxlen=_CHAINS)
        try:
            session = admit(stream, self._peer.secret, self._peer.model)
            stream.timeout = self._peer.timeout
            host = self.address[0] if stream.is_local else connection.getpeername()[0]
            while stream.wait(self._closed.is_set):
                chain = self._receive(stream, session, f"{host}:{session.port}")
                if chain not in chains:
                    chains.append(chain)
        except Refused as error:
            self._refuse(error.reason, error)
        except BrokenFrame as error:
            self._refuse("frame", error)
        except OSError as error:  # closed in the midst of something, or too slow
            self._refuse("incomplete", error)
        finally:
            stream.close()
            self.mailbox.break_off(chains)
            self._slots.release()

    def _receive(self, stream: SocketStream, session: Session, origin: str) -> bytes:
        header = session.open(stream.read(session.header_size), self._peer.limit)
        if header.passed:
            payload = read_passed(stream.take_file(), header.bytes)
        else:
            payload = np.empty(header.bytes, np.uint8).data  # not bytearray: that would be zeroed first
            stream.read_into(payload)
            session.check(payload, stream.read(session.mac_size))
        with self._counting:
            self.bytes += header.bytes
        if header.bytes:
            self.mailbox.put(Arrival(header.piece, payload, origin))
        else:
            self.mailbox.break_off([header.piece.chain])
        return header.piece.chain

    def _refuse(self, reason: str, error: Exception) -> None:
        if not self._closed.is_set():
            with self._counting:
                self.refused[reason] += 1
            level = logging.WARNING if self.refused[reason] == 1 else logging.DEBUG  # no peer fills the log
            _logger.log(level, "a peer was refused (%s): %s", reason, error)


class Sender:
    """Sends frames to one engine, from a thread of its own; connects when there is something to send.

    Args:
        address: Of the engine's receiver.
        peer: What is expected of it.
        by: "tcp"; "local": files in memory; "auto": these where the receiver is on this host, else TCP.
        port: At which this engine listens itself, for the receiver to name it by.
    """

    def __init__(
        self, peer: Peer, address: Address, by: Literal["auto", "tcp", "local"] = "auto", port: int = 0
    ) -> None:
        self._peer, self._address, self._by, self._port = peer, address, by, port
        self._waiting: deque[tuple[float, Piece, memoryview]] = deque()
        self._changed = threading.Condition()
        self._pending = 0  # bytes
        self._closed = False
        self._connection: tuple[SocketStream, Session] | None = None
        self.bytes = 0
        self.dropped = 0  # frames
        self.failed: Counter[str] = Counter()  # tries to connect or to send, by reason
        self._thread = threading.Thread(target=self._run, daemon=True, name="runahead-send")
        self._thread.start()

    def send(self, piece: Piece, payload: memoryview) -> bool:
        """Queues a frame and returns at once; False if no room is left, and it is dropped.

        The payload must not change until it is sent.

        Raises:
            ValueError: It is larger than what a frame may hold.
        """
        if payload.nbytes > self._peer.limit or not payload.nbytes:
            raise ValueError(f"a payload of {payload.nbytes} bytes; expected 1 to {self._peer.limit}")
        with self._changed:
            if self._closed or self._pending + payload.nbytes > self._peer.capacity:
                self.dropped += 1
                return False
            self._pending += payload.nbytes
            self._waiting.append((time.monotonic(), piece, payload))
            self._changed.notify_all()
        return True

    def break_off(self, chain: bytes) -> None:
        """Says that nothing more of a chain comes, and drops what of it waits."""
        with self._changed:
            if self._closed:
                return
            under_way = [self._waiting.popleft()] if self._waiting else []
            kept = [frame for frame in self._waiting if frame[1].chain != chain]
            self._pending -= sum(frame[2].nbytes for frame in self._waiting) - sum(frame[2].nbytes for frame in kept)
            last = (time.monotonic(), Piece(chain, 0, 0, 0), memoryview(b""))
            self._waiting = deque([*under_way, *kept, last])
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Whether all that was queued left in time; what is late is dropped by then or goes on."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self) -> None:
        """Drops what still waits and ends the connection."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if (connection := self._connection) is not None:
            connection[0].abort()  # it may be in the midst of a frame that nobody takes
        self._thread.join(2 * _HANDSHAKE)

    def _run(self) -> None:
        pause = _BACKOFF[0]
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait(1.0)
                if self._closed:
                    break
                queued, piece, payload = self._waiting[0]
            late = time.monotonic() - queued > self._peer.timeout
            if not late and not self._sent(piece, payload):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, _BACKOFF[1])
                continue
            pause = pause if late else _BACKOFF[0]
            with self._changed:
                self._waiting.popleft()
                self._pending -= payload.nbytes
                self.dropped += late
                self._changed.notify_all()
        self._disconnect()

    def _sent(self, piece: Piece, payload: memoryview) -> bool:
        try:
            if self._connection is not None and self._connection[0].peer_closed:
                self._disconnect()
            if self._connection is None:
                self._connection = self._connect()
            stream, session = self._connection
            is_passed = stream.is_local and payload.nbytes > 0
            header, mac = session.seal(piece, payload, passed=is_passed)
            if is_passed:
                stream.write_file(header, passed_file(payload))
            else:
                stream.write_parts([memoryview(header), payload, memoryview(mac)])
        except OSError as error:
            reason = error.reason if isinstance(error, Refused) else "connection"
            if not self.failed[reason]:
                _logger.warning("cannot send to %s:%d yet (%s): %s", *self._address, reason, error)
            self.failed[reason] += 1
            self._disconnect()
            return False
        self.bytes += payload.nbytes
        return True

    def _connect(self) -> tuple[SocketStream, Session]:
        stream = SocketStream(self._open(), _HANDSHAKE)
        try:
            session = greet(stream, self._peer.secret, self._peer.model, self._port)
        except BaseException:
            stream.close()
            raise
        stream.timeout = self._peer.timeout
        return stream, session

    def _open(self) -> socket.socket:
        if self._by != "tcp":
            local = socket.socket(socket.AF_UNIX)
            try:
                local.settimeout(_HANDSHAKE)
                local.connect(_local_name((socket.gethostbyname(self._address[0]), self._address[1])))
                return local
            except OSError:
                local.close()
                if self._by == "local":
                    raise
        tcp = socket.create_connection(self._address, _HANDSHAKE)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return tcp

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection[0].close()
            self._connection = None


def _local_name(address: Address) -> bytes:
    # In Linux's abstract namespace: seen by this host's engines (of one network namespace), gone with its process.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    return f"\0forerun-runahead-{host}-{address[1]}".encode()
