"""A socket whose every call ends in time, with whole reads and writes, and files passed beside its bytes."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

__all__ = ["SocketStream", "passed_file", "read_passed"]

_SLOWEST = 1e6  # bytes a second
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SocketStream:
    """Whole reads and writes on a socket.

    Args:
        connection: The socket; closed with the stream.
        timeout: Seconds that one read or write may take, beside a second for each megabyte.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket = connection
        self.timeout = timeout
        self._files: list[int] = []

    @property
    def is_local(self) -> bool:
        """Whether the peer is on this host and takes files."""
        return self._socket.family == socket.AF_UNIX

    def read(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            ConnectionError: The peer closed the connection before.
            TimeoutError: They did not come in time.
        """
        buffer = bytearray(size)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def read_into(self, view: memoryview) -> None:
        """Fills the buffer; raises as `read`."""

        def receive(rest: memoryview) -> int:
            if not self.is_local:
                return self._socket.recv_into(rest)
            data, files, _, _ = socket.recv_fds(self._socket, len(rest), 1)
            self._files += files
            rest[: len(data)] = data
            return len(data)

        self._all(view, receive, "closed the connection in the midst of a message")

    def wait(self, closed: Callable[[], bool], poll: float = 0.5) -> bool:
        """Whether something came; False once the peer has closed the connection, or `closed` says so."""
        while not closed():
            self._socket.settimeout(poll)
            try:
                return bool(self._socket.recv(1, socket.MSG_PEEK))
            except TimeoutError:
                continue
        return False

    def write(self, data: bytes) -> None:
        """Writes all; raises `OSError` if that fails or takes too long."""
        self.write_parts([memoryview(data)])

    def write_parts(self, parts: Sequence[memoryview], files: Sequence[int] = ()) -> None:
        """Writes several buffers without joining them, the files with their first byte."""
        deadline = self._deadline(sum(part.nbytes for part in parts))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        rest = [part.cast("B") for part in parts if part.nbytes]
        while rest:
            self._settle(deadline)
            sent = self._socket.sendmsg(rest, ancillary)
            ancillary = []
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]

    def write_file(self, data: bytes, file: int) -> None:
        """Writes bytes with a file beside them, and closes the descriptor."""
        try:
            self.write_parts([memoryview(data)], [file])
        finally:
            os.close(file)

    def take_file(self) -> int:
        """The descriptor that came first and was not taken yet; the caller closes it.

        Raises:
            ConnectionError: None came.
        """
        if not self._files:
            raise ConnectionError("a frame came without the file that it announced")
        return self._files.pop(0)

    @property
    def peer_closed(self) -> bool:
        """Whether the peer, which has nothing to say, has closed the connection."""
        try:
            self._socket.settimeout(0)
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def abort(self) -> None:
        """Ends the connection, and whatever call another thread is in; to be closed all the same."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
        self._socket.close()

    def _all(self, view: memoryview, receive: Callable[[memoryview], int], told: str) -> None:
        deadline = self._deadline(len(view))
        while view:
            self._settle(deadline)
            count = receive(view)
            if count == 0:
                raise ConnectionError(f"the peer {told}")
            view = view[count:]

    def _deadline(self, size: int) -> float:
        return time.monotonic() + self.timeout + size / _SLOWEST

    def _settle(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the peer is too slow: {self.timeout} s and {_SLOWEST / 1e6:.0f} MB/s are granted")
        self._socket.settimeout(left)


def passed_file(payload: memoryview) -> int:
    """A descriptor of a file in memory that holds the payload and can never change; the caller closes it."""
    file = os.memfd_create("forerun-runahead", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = payload.cast("B")
        while rest:
            rest = rest[os.write(file, rest) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file


def read_passed(file: int, size: int) -> memoryview:
    """The content of such a file, without a copy; closes the descriptor.

    Raises:
        ConnectionError: It is not sealed, so that reading it could fail later, or not of that size.
    """
    try:
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(file).st_size != size:
            raise ConnectionError("a file was passed that is not sealed, or not of the size announced")
        # Private: the receiver's own writes, if any, stay its own.
        return memoryview(mmap.mmap(file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
    except OSError as error:
        raise ConnectionError(f"a passed file cannot be read: {error}") from error
    finally:
        os.close(file)
