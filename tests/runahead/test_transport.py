"""Keys and values between engines: whole, in order, authentic; and what a hostile or broken peer gets."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from forerun.runahead.mailbox import Arrival, Mailbox
from forerun.runahead.stream import SocketStream, passed_file
from forerun.runahead.transport import Peer, Receiver, Sender, parse_address
from forerun.runahead.wire import Piece, Refused, Session, admit, greet, identity

SECRET, MODEL, CHAIN = b"between us", identity("tiny", 2, "float32"), b"c" * 16
PEER = Peer(SECRET, MODEL, timeout=2.0, limit=1 << 20, capacity=1 << 24)
WAYS = ("tcp", "local")


@pytest.fixture
def receiver():
    receiver = Receiver(PEER)
    yield receiver
    receiver.close()


@pytest.fixture
def send_to():
    """A sender to a receiver, closed at the end."""
    senders = []

    def make(receiver, by="tcp", peer=PEER):
        senders.append(Sender(peer, receiver.address, by))
        return senders[-1]

    yield make
    for sender in senders:
        sender.close()


def payload(seed, size=1000):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def connect(receiver, by="tcp"):
    if by == "local":
        local = socket.socket(socket.AF_UNIX)
        local.connect(f"\0forerun-runahead-{receiver.address[0]}-{receiver.address[1]}".encode())
        return local
    return socket.create_connection(receiver.address, 5)


def assert_serves(receiver, send_to, by="tcp"):
    """An honest peer is heard."""
    sent, chain = payload(1), os.urandom(16)
    assert send_to(receiver, by).send(Piece(chain, 0, 0, 4), sent.data)
    (arrival,) = receiver.mailbox.take(chain, 0, 0, 4, 5.0)
    assert bytes(arrival.payload) == sent.tobytes()


@pytest.mark.parametrize("by", WAYS)
def test_frames_arrive_whole(receiver, send_to, by):
    sender = send_to(receiver, by)
    sizes = [1, 7, 4096, 65537, 1 << 20]
    for layer, size in enumerate(sizes):
        assert sender.send(Piece(CHAIN, layer, 0, 8), payload(layer, size).data)
    for layer, size in enumerate(sizes):
        (arrival,) = receiver.mailbox.take(CHAIN, layer, 0, 8, 5.0)
        assert arrival.piece == Piece(CHAIN, layer, 0, 8)
        assert bytes(arrival.payload) == payload(layer, size).tobytes()
    assert sender.flush(1.0)
    assert sender.bytes == receiver.bytes == sum(sizes)
    assert receiver.mailbox.bytes == 0
    assert not receiver.refused


def test_on_one_host_files_are_passed(receiver, send_to):
    sender = send_to(receiver, "auto")
    assert sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    assert receiver.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    assert sender._connection[0].is_local


def test_pieces_cover_a_range_in_any_order(receiver, send_to):
    sender = send_to(receiver)
    for start, end in ((8, 12), (0, 4)):
        sender.send(Piece(CHAIN, 0, start, end), payload(start).data)
    assert receiver.mailbox.take(CHAIN, 0, 0, 12, 0.2) is None
    sender.send(Piece(CHAIN, 0, 3, 9), payload(3).data)
    assert len(receiver.mailbox.take(CHAIN, 0, 0, 12, 5.0)) == 3
    assert receiver.mailbox.take(CHAIN, 0, 0, 12, 0.05) is None


def test_a_sender_waits_for_its_receiver(receiver, send_to):
    address = receiver.address
    receiver.close()
    sender = send_to(receiver)
    sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    wait_until(lambda: sender.failed["connection"])
    again = Receiver(PEER, address)
    try:
        assert again.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    finally:
        again.close()


@pytest.mark.parametrize("by", WAYS)
def test_a_sender_reconnects(receiver, send_to, by):
    sender = send_to(receiver, by)
    sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    assert receiver.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    receiver.close()
    wait_until(lambda: sender._connection[0].peer_closed)
    again = Receiver(PEER, receiver.address)
    try:
        sender.send(Piece(CHAIN, 1, 0, 1), payload(1).data)
        assert again.mailbox.take(CHAIN, 1, 0, 1, 5.0)
    finally:
        again.close()


def test_what_nobody_takes_is_dropped_in_time():
    mailbox = Mailbox(100, keep=0.1)
    mailbox.put(Arrival(Piece(b"a" * 16, 0, 0, 1), memoryview(bytes(60))))
    assert mailbox.reach() == {b"a" * 16: 1}
    time.sleep(0.15)
    assert (mailbox.reach(), mailbox.bytes, mailbox.dropped) == ({}, 0, 1)


def test_a_chain_that_finds_no_room_need_not_be_waited_for():
    mailbox = Mailbox(100, keep=60)
    mailbox.put(Arrival(Piece(b"a" * 16, 0, 0, 1), memoryview(bytes(60))))
    mailbox.put(Arrival(Piece(b"b" * 16, 0, 0, 1), memoryview(bytes(30))))
    mailbox.put(Arrival(Piece(b"b" * 16, 1, 0, 1), memoryview(bytes(60))))
    assert (mailbox.bytes, mailbox.dropped, mailbox.broken) == (60, 1, {b"b" * 16})
    began = time.monotonic()
    assert mailbox.take(b"b" * 16, 0, 0, 1, 5.0) is None
    assert time.monotonic() - began < 1
    mailbox.finish(b"b" * 16)
    mailbox.put(Arrival(Piece(b"b" * 16, 0, 0, 1), memoryview(bytes(30))))  # it is over
    assert (mailbox.bytes, mailbox.dropped, mailbox.broken) == (60, 2, set())
    assert mailbox.take(b"a" * 16, 0, 0, 1, 5.0)


def test_what_comes_first_is_taken_first():
    mailbox, wanted = Mailbox(100, keep=60), [Piece(chain * 16, 0, 0, 1) for chain in (b"a", b"b", b"c")]
    assert mailbox.take_first(wanted, 0.01) is None
    mailbox.put(Arrival(wanted[1], memoryview(bytes(60))))
    piece, arrivals = mailbox.take_first(wanted, 5.0)
    assert (piece, len(arrivals)) == (wanted[1], 1)
    mailbox.break_off([wanted[2].chain])
    assert mailbox.take_first(wanted, 5.0) == (wanted[2], None)


@pytest.mark.parametrize("by", WAYS)
def test_a_chain_is_broken_off_by_word(receiver, send_to, by):
    """Nothing of it waits any more, on either side; other chains go on over the same connection."""
    sender = send_to(receiver, by)
    assert sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    assert receiver.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    sender.break_off(CHAIN)
    began = time.monotonic()
    assert receiver.mailbox.take(CHAIN, 1, 0, 1, 10.0) is None
    assert time.monotonic() - began < 5
    other = os.urandom(16)
    assert sender.send(Piece(other, 0, 0, 1), payload(1).data)
    assert receiver.mailbox.take(other, 0, 0, 1, 5.0)
    assert not receiver.refused


def test_what_waits_of_a_chain_that_is_broken_off_is_dropped(receiver, send_to):
    receiver.close()  # nothing leaves
    sender = send_to(receiver, peer=Peer(SECRET, MODEL, timeout=60, capacity=10_000))
    for chain in (b"a" * 16, CHAIN, b"b" * 16, CHAIN):
        assert sender.send(Piece(chain, 0, 0, 1), payload(0).data)
    sender.break_off(CHAIN)
    assert sender._pending == 2000
    assert [frame[1].chain[:1] for frame in sender._waiting] == [b"a", b"b", b"c"]


def test_a_receiver_names_who_sends(receiver):
    sender = Sender(PEER, receiver.address, "tcp", port=7001)
    sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    (arrival,) = receiver.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    sender.close()
    assert arrival.origin == "127.0.0.1:7001"


def test_a_queue_is_bounded_and_never_blocks(receiver, send_to):
    receiver.close()
    sender = send_to(receiver, peer=Peer(SECRET, MODEL, timeout=0.5, capacity=2500))
    began = time.monotonic()
    assert [sender.send(Piece(CHAIN, layer, 0, 1), payload(0).data) for layer in range(3)] == [True, True, False]
    assert time.monotonic() - began < 0.2
    assert sender.flush(10)  # given up after the time-out
    assert (sender.dropped, sender.bytes) == (3, 0)
    with pytest.raises(ValueError, match="expected 1 to"):
        sender.send(Piece(CHAIN, 0, 0, 1), memoryview(b""))


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(
    ("peer", "reason"),
    [(Peer(b"another", MODEL, timeout=1), "secret"), (Peer(SECRET, identity("other"), timeout=1), "model")],
)
def test_a_stranger_is_refused(receiver, send_to, by, peer, reason):
    stranger = send_to(receiver, by, peer)
    stranger.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    wait_until(lambda: stranger.failed[reason])
    # Of two secrets neither side can prove its own: the sender finds out first, and leaves.
    wait_until(lambda: receiver.refused["incomplete" if reason == "secret" else reason])
    assert receiver.mailbox.take(CHAIN, 0, 0, 1, 0.05) is None
    assert_serves(receiver, send_to, by)


def test_a_peer_that_cannot_prove_the_secret_is_refused(receiver, send_to):
    with connect(receiver) as connection:
        connection.sendall(struct.pack("!4sH16s32sH", b"FRKV", 1, bytes(16), MODEL, 0))
        assert len(connection.recv(100)) == 55
        connection.sendall(bytes(32))
        assert connection.recv(1) == b"\1"
    wait_until(lambda: receiver.refused["secret"])
    assert_serves(receiver, send_to)


def test_another_version_is_refused_on_both_sides(receiver, send_to):
    with connect(receiver) as connection:
        connection.sendall(struct.pack("!4sH16s32sH", b"FRKV", 2, bytes(16), MODEL, 0))
        assert connection.recv(100)[6] == 1
    wait_until(lambda: receiver.refused["version"])

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!4sHB16s32s", b"FRKV", 9, 0, bytes(16), bytes(32)))
        with pytest.raises(Refused, match="version 9"):
            greet(SocketStream(ours, 1), SECRET, MODEL)
    assert_serves(receiver, send_to)


def test_a_sender_is_not_fooled_by_its_own_words():
    """A receiver that answers with what the sender said, or another connection did, proves nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!4sHB16s32s", b"FRKV", 1, 0, bytes(16), bytes(32)))
        with pytest.raises(Refused, match="another secret"):
            greet(SocketStream(ours, 1), SECRET, MODEL)


def recorded(receiver, frames):
    """What an honest sender says after its handshake, through a connection that is used up: bytes for a replay."""
    with connect(receiver) as connection:
        session = greet(SocketStream(connection, 2), SECRET, MODEL)
        said = []
        for layer in range(frames):
            body = payload(layer).data
            header, mac = session.seal(Piece(CHAIN, layer, 0, 1), body, passed=False)
            said.append(header + bytes(body) + mac)
        connection.sendall(b"".join(said))
        assert receiver.mailbox.take(CHAIN, frames - 1, 0, 1, 5.0)
    return said


def test_a_replay_is_refused(receiver, send_to):
    said = recorded(receiver, 2)
    for frames in (said, said[:1] * 2, said[1:]):
        before = receiver.refused["frame"]
        with connect(receiver) as connection:
            greet(SocketStream(connection, 2), SECRET, MODEL)
            connection.sendall(b"".join(frames))
            wait_until(lambda before=before: receiver.refused["frame"] > before)
    assert_serves(receiver, send_to)


def test_a_frame_repeated_or_left_out_in_its_own_connection_is_refused(receiver, send_to):
    for order in ((0, 0), (0, 2)):
        before, bytes_before = receiver.refused["frame"], receiver.bytes
        with connect(receiver) as connection:
            session = greet(SocketStream(connection, 2), SECRET, MODEL)
            body = payload(0).data
            sealed = [session.seal(Piece(CHAIN, 0, 0, 1), body, passed=False) for _ in range(3)]
            connection.sendall(b"".join(sealed[i][0] + bytes(body) + sealed[i][1] for i in order))
            wait_until(lambda before=before: receiver.refused["frame"] > before)
            assert receiver.bytes - bytes_before == 1000
    assert_serves(receiver, send_to)


@pytest.mark.parametrize("size", [0, 1 << 63])
def test_an_absurd_length_is_refused_before_anything_is_allocated(receiver, send_to, size):
    class Absurd:
        nbytes = size

    with connect(receiver) as connection:
        session = greet(SocketStream(connection, 2), SECRET, MODEL)
        connection.sendall(session.seal(Piece(CHAIN, 0, 0, 1), Absurd(), passed=True)[0])
        wait_until(lambda: receiver.refused["frame"])
    assert_serves(receiver, send_to)


@pytest.mark.parametrize("kept", [10, 80, 1000])
def test_a_truncated_frame_is_refused(receiver, send_to, kept):
    with connect(receiver) as connection:
        session = greet(SocketStream(connection, 2), SECRET, MODEL)
        header, mac = session.seal(Piece(CHAIN, 0, 0, 1), payload(0).data, passed=False)
        connection.sendall((header + payload(0).tobytes() + mac)[:kept])
    wait_until(lambda: receiver.refused["incomplete"])
    assert_serves(receiver, send_to)


def test_a_peer_that_stops_in_the_midst_is_given_up(receiver, send_to):
    with connect(receiver) as connection:
        session = greet(SocketStream(connection, 2), SECRET, MODEL)
        connection.sendall(session.seal(Piece(CHAIN, 0, 0, 1), payload(0).data, passed=False)[0][:20])
        wait_until(lambda: receiver.refused["incomplete"], 4 * PEER.timeout)
    assert_serves(receiver, send_to)


def test_a_passed_file_must_be_sealed_and_as_long_as_announced(receiver, send_to):
    loose = os.memfd_create("loose")
    os.write(loose, bytes(1000))
    for file in (loose, passed_file(memoryview(bytes(999)))):
        before = receiver.refused["incomplete"]
        with connect(receiver, "local") as connection:
            stream = SocketStream(connection, 2)
            session = greet(stream, SECRET, MODEL)
            header, _ = session.seal(Piece(CHAIN, 0, 0, 1), payload(0).data, passed=True)
            stream.write_file(header, file)
            wait_until(lambda before=before: receiver.refused["incomplete"] > before)
    with connect(receiver, "local") as connection:  # and there must be one
        session = greet(SocketStream(connection, 2), SECRET, MODEL)
        connection.sendall(session.seal(Piece(CHAIN, 0, 0, 1), payload(0).data, passed=True)[0])
        wait_until(lambda: receiver.refused["incomplete"] == 3)
    assert_serves(receiver, send_to, "local")


def fuzz(receiver, frames, seed):
    """Frames that are broken in one way each, or noise, on connections with and without a handshake."""
    rng = np.random.default_rng(seed)
    refused = 0
    for turn in range(frames):
        with connect(receiver, WAYS[turn % 2]) as connection:
            said = bytearray(rng.bytes(int(rng.integers(1, 300))))
            if rng.random() < 0.8:
                session = greet(SocketStream(connection, 2), SECRET, MODEL)
                body = payload(turn, int(rng.integers(1, 2000)))
                header, mac = session.seal(Piece(CHAIN, turn, 0, 1), body.data, passed=False)
                said = bytearray(header + body.tobytes() + mac)
                if rng.random() < 0.5:
                    said[int(rng.integers(len(said)))] ^= 1 << int(rng.integers(8))
                else:
                    said = said[: int(rng.integers(1, len(said)))]
            with suppress(OSError):  # refused before all of it was said
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
        refused += 1
    wait_until(lambda: sum(receiver.refused.values()) == refused, 30)
    assert receiver.mailbox.bytes == receiver.bytes == 0


def open_files():
    """What this process holds open: a socket's inode is no other's."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def test_a_fuzzed_wire(receiver, send_to):
    before = open_files()
    fuzz(receiver, 400, seed=0)
    wait_until(lambda: open_files() <= before)
    assert_serves(receiver, send_to)


@pytest.mark.soak
def test_a_wire_fuzzed_for_long(receiver, send_to):
    before = open_files()
    fuzz(receiver, 12_000, seed=1)
    wait_until(lambda: open_files() <= before)
    assert_serves(receiver, send_to)
    assert_serves(receiver, send_to, "local")


SENDING = """
import sys, time
from forerun.runahead.transport import *
from forerun.runahead.wire import *
sender = Sender(Peer(b"between us", identity("tiny", 2, "float32")), ("127.0.0.1", int(sys.argv[1])), sys.argv[2])
for layer in range(10**9):
    if not sender.send(Piece(b"c" * 16, layer, 0, 1), memoryview(bytes([layer % 256]) * (1 << 20))):
        time.sleep(0.01)
"""


@pytest.mark.parametrize("by", WAYS)
def test_a_sender_that_is_killed_leaves_whole_frames_only(send_to, by):
    receiver = Receiver(PEER)
    process = subprocess.Popen([sys.executable, "-c", SENDING, str(receiver.address[1]), by])
    try:
        wait_until(lambda: receiver.bytes > 3 << 20, 30)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        count = receiver.bytes >> 20
        assert receiver.bytes == count << 20
        for layer in range(min(count, 10)):
            (arrival,) = receiver.mailbox.take(CHAIN, layer, 0, 1, 5.0)
            assert set(bytes(arrival.payload)) == {layer % 256}
        assert_serves(receiver, send_to, by)
    finally:
        process.kill()
        process.wait(10)
        receiver.close()


def test_a_sender_closes_at_once_in_the_midst_of_a_frame(receiver):
    patient = Peer(SECRET, MODEL, timeout=60, limit=1 << 28, capacity=1 << 30)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        sender = Sender(patient, deaf.getsockname(), "tcp")
        sender.send(Piece(CHAIN, 0, 0, 1), memoryview(bytes(1 << 26)))
        connection, _ = deaf.accept()
        with connection:
            admit(SocketStream(connection, 5), SECRET, MODEL)
            time.sleep(0.3)  # the frame fills the socket
            began = time.monotonic()
            sender.close()
            assert time.monotonic() - began < 3
            assert not sender._thread.is_alive()


def test_a_closed_receiver_leaves_no_thread_and_no_socket():
    files, threads = open_files(), set(threading.enumerate())
    receiver = Receiver(PEER)
    sender = Sender(PEER, receiver.address)
    sender.send(Piece(CHAIN, 0, 0, 1), payload(0).data)
    assert receiver.mailbox.take(CHAIN, 0, 0, 1, 5.0)
    sender.close()
    receiver.close()
    wait_until(lambda: open_files() <= files and set(threading.enumerate()) <= threads)


def test_sequences_are_of_a_session():
    one, other = Session(b"k" * 32), Session(b"k" * 32)
    header, mac = one.seal(Piece(CHAIN, 3, 5, 9), memoryview(b"abc"), passed=False)
    assert other.open(header, 10).piece == Piece(CHAIN, 3, 5, 9)
    other.check(memoryview(b"abc"), mac)


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:port", "host:70000", "host:-1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="expected host:port"):
        parse_address(text)


def test_addresses_and_secrets():
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address("[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match="secret is empty"):
        Peer(b"", MODEL)
