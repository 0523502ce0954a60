"""A stage without vLLM: what the scheduler's half decides, and what workers move, their caches plain tensors."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.runahead.relay import Relay
from forerun.runahead.stage import Over, Part, Stage, Stages, parse_stage
from forerun.runahead.transport import Peer
from forerun.runahead.wire import identity

BLOCK, LAYERS, POOL = 4, 3, 64
PEER = Peer(b"secret", identity("test"), timeout=5.0)
NOTHING = frozenset()


def stage(chain, start, end, follows=None):
    return Stage(chain, start, end, follows)


class TestAdmission:
    def test_a_request_waits_for_the_first_layer_of_all_tokens_before(self):
        stages, chain = Stages(BLOCK, timeout=60), bytes(16)
        ask = lambda computed=0: stages.matched("r", stage(chain, 12, 20), 20, computed)  # noqa: E731
        assert ask() is None
        assert stages.waiting
        stages.note({chain: 8}, NOTHING, NOTHING)
        assert ask() is None
        stages.note({chain: 12}, NOTHING, NOTHING)
        assert (ask(), ask(4)) == (12, 8)
        stages.place("r", 12)
        assert not stages.waiting
        assert ask() == 0  # preempted: what had come is gone

    @pytest.mark.parametrize(
        ("start", "tokens", "computed"), [(0, 20, 0), (12, 20, 12), (12, 20, 16), (12, 12, 0), (12, 8, 0)]
    )
    def test_what_needs_nothing_does_not_wait(self, start, tokens, computed):
        assert Stages(BLOCK, 60).matched("r", stage(bytes(16), start, start + 8), tokens, computed) == 0

    def test_it_is_given_up_in_time_or_when_the_chain_breaks(self):
        stages = Stages(BLOCK, timeout=0.05)
        assert stages.matched("r", stage(bytes(16), 12, 20), 20, 0) is None
        time.sleep(0.06)
        assert stages.matched("r", stage(bytes(16), 12, 20), 20, 0) == 0
        patient = Stages(BLOCK, timeout=60)
        patient.note({}, frozenset({bytes(16)}), NOTHING)
        assert patient.matched("r", stage(bytes(16), 12, 20), 20, 0) == 0
        assert (stages.given_up, patient.given_up) == (1, 1)

    def test_whole_blocks_are_sent_once(self):
        stages = Stages(BLOCK, 60)
        first = stage(bytes(16), 0, 16, ("h", 1))
        assert stages.matched("r", first, 16, 0) == 0
        stages.place("r", 0)
        sent = [
            part.send if (part := stages.part("r", computed, tokens, blocks, is_new=new)) else None
            for computed, tokens, blocks, new in ((0, 6, [7, 8], True), (6, 1, [], False), (7, 9, [9, 3], False))
        ]
        assert sent == [(0, 4), None, (4, 16)]
        assert stages.part("r", 16, 1, [5], is_new=False) is None  # decoding

    def test_a_last_stage_loads_once(self):
        stages, chain = Stages(BLOCK, 60), bytes(16)
        stages.note({chain: 8}, NOTHING, NOTHING)
        assert stages.matched("r", stage(chain, 8, 13), 13, 4) == 4
        stages.place("r", 4)
        part = stages.part("r", 8, 5, [1, 2, 3, 4], is_new=True)
        assert (part.load, part.send, part.blocks) == ((4, 8), None, [1, 2, 3, 4])
        assert stages.note({}, NOTHING, frozenset({chain})) == [1, 2, 3, 4]
        assert stages.part("r", 4, 9, [], is_new=False) is None  # computes it anew
        stages.finish("r")
        assert (stages.take_finished(), stages.take_finished()) == ([Over(chain, None)], [])
        assert stages.failed == 1
        assert stages.note({}, NOTHING, frozenset({chain})) == []

    def test_several_samples_of_a_prompt_do_not_wait_for_what_comes_once(self):
        stages, chain = Stages(BLOCK, 60), bytes(16)
        own = stage(chain, 8, 13)
        assert [stages.matched(name, own, 13, 0) for name in ("0_r", "1_r", "0_r")] == [None, 0, None]
        stages.place("1_r", 0)
        assert stages.part("1_r", 0, 13, [1, 2, 3, 4], is_new=True) is None
        stages.finish("1_r")
        assert (stages.take_finished(), stages.waiting) == ([], True)
        stages.finish("0_r")
        assert (stages.take_finished(), stages.waiting) == ([Over(chain, None)], False)

    def test_a_sample_that_is_preempted_does_not_wait_for_what_came_for_another(self):
        stages, own = Stages(BLOCK, 60), stage(bytes(16), 8, 13)
        assert [stages.matched(name, own, 13, 0) for name in ("0_r", "1_r")] == [None, 0]
        stages.finish("0_r")
        assert stages.matched("1_r", own, 13, 0) == 0

    def test_a_request_that_is_refused_leaves_nobody_to_wait(self):
        stages, own = Stages(BLOCK, 60), stage(bytes(16), 8, 16, ("h", 1))
        for _ in range(2):
            stages.refuse("r", own)
            assert stages.matched("r", own, 16, 0) == 0
        assert stages.take_finished() == [Over(own.chain, ("h", 1))]
        assert not stages.waiting
        stages.finish("r")
        assert (stages.take_finished(), stages._apart) == ([], set())

    @pytest.mark.parametrize(("computed", "misses"), [(0, True), (6, True), (16, False)])
    def test_the_engine_after_is_told_of_what_it_misses(self, computed, misses):
        """A request that ends before all of it was sent: aborted while it waits, or between two chunks."""
        stages, own = Stages(BLOCK, 60), stage(bytes(16), 0, 16, ("h", 1))
        stages.matched("r", own, 16, 0)
        if computed:
            stages.place("r", 0)
            stages.part("r", 0, computed, [7, 8, 9, 3], is_new=True)
        stages.finish("r")
        assert stages.take_finished() == [Over(own.chain, ("h", 1) if misses else None)]
        assert not stages.waiting

    def test_a_preempted_request_starts_anew_and_sends_on(self):
        """What it loaded is gone with its blocks: it is computed; what was sent is not sent again."""
        stages, own = Stages(BLOCK, 60), stage(bytes(16), 8, 24, ("h", 1))
        stages.note({own.chain: 8}, NOTHING, NOTHING)
        assert stages.matched("r", own, 24, 0) == 8
        stages.place("r", 8)
        assert stages.part("r", 8, 6, [0, 1, 2, 3], is_new=True)[2:] == ((0, 8), (0, 12))
        assert stages.matched("r", own, 24, 0) == 0
        stages.place("r", 0)
        assert stages.part("r", 0, 10, [5, 6, 7], is_new=True) is None
        part = stages.part("r", 10, 14, [8, 9, 4], is_new=False)
        assert (part.load, part.send, part.blocks) == (None, (12, 24), [5, 6, 7, 8, 9, 4])

    def test_other_requests_are_none_of_its_business(self):
        stages = Stages(BLOCK, 60)
        stages.place("other", 0)
        assert stages.part("other", 0, 5, [1], is_new=True) is None
        stages.finish("other")
        assert stages.take_finished() == []


def test_a_request_that_its_chain_is_not_for_is_remembered_until_it_is_over():
    stages = Stages(BLOCK, 10.0)
    stages.refuse("r")
    assert "r" in stages and stages.given_up == 1
    assert stages.matched("r", stage(b"a" * 16, 8, 17), 17, 0) == 0 and not stages.waiting
    stages.finish("r")
    assert "r" not in stages and stages.take_finished() == []


def test_parameters_are_read():
    given_part = {"chain": "ab" * 16, "start": 8, "end": 17, "next": None}
    assert parse_stage({"runahead": given_part}, BLOCK) == stage(b"\xab" * 16, 8, 17)
    assert parse_stage({"runahead": {**given_part, "end": 16, "next": "h:1"}}, BLOCK).next == ("h", 1)
    assert parse_stage(None, BLOCK) is parse_stage({"other": 1}, BLOCK) is None
    with pytest.raises(ValueError, match="blocks of 4"):
        parse_stage({"runahead": {**given_part, "next": "h:1"}}, BLOCK)
    with pytest.raises(ValueError, match="blocks of 4"):
        parse_stage({"runahead": {**given_part, "start": 6}}, BLOCK)
    with pytest.raises(ValueError, match="digest of the prompt"):
        parse_stage({"runahead": {**given_part, "prompt": 5}}, BLOCK)
    assert parse_stage({"runahead": {**given_part, "prompt": "ab"}}, BLOCK).prompt == "ab"


class Worker:
    """A relay with a cache of its own, whose blocks a request has in random order."""

    def __init__(self, seed, by="auto", timeout=5.0):
        generator = torch.Generator().manual_seed(seed)
        self.caches = [torch.zeros(POOL, 2, BLOCK, 3) for _ in range(LAYERS)]
        self.order = torch.randperm(POOL, generator=generator).tolist()
        self.relay = Relay(self.caches, BLOCK, PEER, ("127.0.0.1", 0), by, timeout)

    def compute(self, truth, part, start, end):
        """One step: every layer writes the own tokens' content, as attention's cache update does, and relays."""
        self.relay.begin([part], [])
        for layer in range(LAYERS):
            for token in range(start, end):
                self.caches[layer][part.blocks[token // BLOCK], :, token % BLOCK] = truth[layer][:, token]
            self.relay.layer(layer)

    def holds(self, truth, tokens):
        return all(
            torch.equal(self.caches[layer][self.order[token // BLOCK], :, token % BLOCK], truth[layer][:, token])
            for layer in range(LAYERS)
            for token in range(tokens)
        )


def make_truth(tokens, seed=0):
    return torch.randn(LAYERS, 2, tokens, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def workers():
    made = [Worker(seed, by) for seed, by in enumerate(("auto", "tcp", "local", "auto"))]
    yield made
    for worker in made:
        worker.relay.close()


def together(*tasks):
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@settings(max_examples=40)
@given(data=st.data())
def test_the_last_engine_holds_every_token(workers, data):
    """Chains of 2 to 4, contexts of any number of blocks, in chunks."""
    count = data.draw(st.integers(2, 4))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    ends = [BLOCK * sum(sizes[: i + 1]) for i in range(count)]
    truth, chain = make_truth(ends[-1], data.draw(st.integers(0, 99))), os.urandom(16)
    chunk = data.draw(st.integers(1, 20))

    def run(i):
        start, follows = (ends[i - 1] if i else 0), workers[i + 1].relay.address if i + 1 < count else None
        own, stages = stage(chain, start, ends[i], follows), Stages(BLOCK, 60)
        worker, computed, loads = workers[i], start, start
        stages.note({chain: start}, NOTHING, NOTHING)
        assert stages.matched("r", own, ends[i] + 1, 0) == start
        stages.place("r", loads)
        while computed < ends[i]:
            tokens = min(chunk, ends[i] - computed)
            blocks = worker.order if computed == start else []
            part = stages.part("r", computed, tokens, blocks, is_new=computed == start)
            worker.compute(truth, part or Part(own, worker.order, None, None), computed, computed + tokens)
            computed += tokens

    together(*(lambda i=i: run(i) for i in range(count)))
    assert workers[count - 1].holds(truth, ends[-1])
    assert not workers[count - 1].relay.take_failed_blocks()


def test_what_is_cached_already_is_sent_but_not_loaded(workers):
    """The middle engine has the first block of the prompt; the last one still gets all."""
    truth, chain, (a, b, c) = make_truth(24), os.urandom(16), workers[:3]
    for layer in range(LAYERS):
        b.caches[layer][b.order[0]] = truth[layer][:, :BLOCK]
    before = b.relay.counted["bytes_loaded"]
    together(
        lambda: a.compute(truth, Part(stage(chain, 0, 8, b.relay.address), a.order, None, (0, 8)), 0, 8),
        lambda: b.compute(truth, Part(stage(chain, 8, 16, c.relay.address), b.order, (4, 8), (0, 16)), 8, 16),
        lambda: c.compute(truth, Part(stage(chain, 16, 24), c.order, (0, 16), None), 16, 24),
    )
    assert c.holds(truth, 24)
    assert b.relay.counted["bytes_loaded"] - before == LAYERS * a.caches[0][0].nbytes


def test_opposing_chains_do_not_wait_for_each_other(workers):
    """One step of A is first in a chain to B and last in one from B, and B's step the other way round."""
    (a, b), truth = workers[:2], make_truth(16)
    one, two = os.urandom(16), os.urandom(16)

    def run(worker, other, leads, follows):
        lead = Part(stage(leads, 0, 8, other.relay.address), worker.order[:8], None, (0, 8))
        follow = Part(stage(follows, 8, 16), worker.order[8:], (0, 8), None)
        worker.relay.begin([follow, lead], [])
        for layer in range(LAYERS):
            for tokens, part in ((range(8), lead), (range(8, 16), follow)):
                for token in tokens:
                    worker.caches[layer][part.blocks[token // BLOCK], :, token % BLOCK] = truth[layer][:, token]
            worker.relay.layer(layer)

    together(lambda: run(a, b, one, two), lambda: run(b, a, two, one))
    for worker in (a, b):
        for layer in range(LAYERS):
            for token in range(16):
                where = worker.order[8 + token // BLOCK]
                assert torch.equal(worker.caches[layer][where, :, token % BLOCK], truth[layer][:, token])
        assert not worker.relay.take_failed_blocks()


@pytest.mark.parametrize("seed", range(3))
def test_many_chains_in_all_directions_do_not_wait_for_each_other(seed):
    """Twelve chains over four engines, in random orders, in one step of each: what one hands on, others wait for."""
    rng, count, length = random.Random(seed), 12, 4
    workers = [Worker(seed) for seed in range(4)]
    try:
        chains = [(os.urandom(16), rng.sample(range(4), 4), make_truth(length * BLOCK, i)) for i in range(count)]

        def run(number):
            worker, parts = workers[number], []
            for i, (chain, order, truth) in enumerate(chains):
                place, blocks = order.index(number), worker.order[4 * i : 4 * i + 4]
                follows = workers[order[place + 1]].relay.address if place < 3 else None
                own = (place * BLOCK, (place + 1) * BLOCK)
                part = Part(
                    stage(chain, *own, follows),
                    blocks,
                    (0, own[0]) if place else None,
                    (0, own[1]) if follows else None,
                )
                parts.append((part, truth, place))
            rng.shuffle(parts)
            worker.relay.begin([part for part, *_ in parts], [])
            for layer in range(LAYERS):
                for part, truth, place in parts:
                    worker.caches[layer][part.blocks[place]] = truth[layer][:, place * BLOCK : (place + 1) * BLOCK]
                worker.relay.layer(layer)

        together(*(lambda i=i: run(i) for i in range(4)))
        for number, worker in enumerate(workers):
            assert not worker.relay.take_failed_blocks()
            for i, (_, order, truth) in enumerate(chains):
                for place in range(order.index(number) + 1):
                    for layer in range(LAYERS):
                        tokens = truth[layer][:, place * BLOCK : (place + 1) * BLOCK]
                        assert torch.equal(worker.caches[layer][worker.order[4 * i + place]], tokens)
    finally:
        for worker in workers:
            worker.relay.close()


def test_the_engine_after_hears_at_once_that_a_chain_is_cut_off(workers):
    """The engine before is lost, or its request is aborted: nobody down the chain waits for the time-out."""
    a, b, c = workers[:3]
    chain, truth = os.urandom(16), make_truth(24)
    b.relay._timeout, c.relay._timeout = 0.3, 60
    try:
        together(
            lambda: b.compute(truth, Part(stage(chain, 8, 16, c.relay.address), b.order, (0, 8), (0, 16)), 8, 16),
            lambda: c.compute(truth, Part(stage(chain, 16, 24), c.order, (0, 16), None), 16, 24),
        )
        assert c.relay.take_failed_blocks() == set(c.order[:4])
        aborted = os.urandom(16)
        a.relay.begin([], [Over(aborted, c.relay.address)])
        began = time.monotonic()
        assert c.relay.receiver.mailbox.take(aborted, 0, 0, 8, 30) is None
        assert time.monotonic() - began < 10
        for worker in (b, c):
            worker.relay.take_failed_blocks()
            worker.relay.begin([], [Over(chain, None), Over(aborted, None)])
            assert not worker.relay._lost | worker.relay._muted
    finally:
        b.relay._timeout = c.relay._timeout = 5.0


def test_waits_are_counted_by_who_was_late(workers):
    """The share of a step that waits tells a split that is out of balance."""
    (a, b), truth, chain = workers[:2], make_truth(16), os.urandom(16)
    b.relay.shares.clear()
    b.relay.waits.clear()

    def late():
        time.sleep(0.4)
        a.compute(truth, Part(stage(chain, 0, 8, b.relay.address), a.order, None, (0, 8)), 0, 8)

    together(late, lambda: b.compute(truth, Part(stage(chain, 8, 16), b.order, (0, 8), None), 8, 16))
    name = "{}:{}".format(*a.relay.address)
    assert b.relay.waits[name] > 0.3
    (share,) = b.relay.shares
    assert 0.5 < share <= 1


def test_a_prefix_that_another_request_loads_is_sent_after_it_came(workers):
    """Two requests of one step share a prefix: the second sends blocks that the first is still to load."""
    (a, b, c), truth = workers[:3], make_truth(16)
    one, two = os.urandom(16), os.urandom(16)
    loads = Part(stage(one, 8, 12), b.order, (0, 8), None)
    sends = Part(stage(two, 0, 8, c.relay.address), b.order, None, (0, 8))

    def middle():
        b.relay.begin([sends, loads], [])
        for layer in range(LAYERS):
            b.relay.layer(layer)

    together(
        lambda: a.compute(truth, Part(stage(one, 0, 8, b.relay.address), a.order, None, (0, 8)), 0, 8),
        middle,
        lambda: c.compute(truth, Part(stage(two, 8, 16), c.order, (0, 8), None), 8, 16),
    )
    assert c.holds(truth, 16)


def test_a_full_queue_to_the_engine_after_leaves_what_comes_from_before():
    truth, chain = make_truth(16), os.urandom(16)
    a, b = Worker(0), Worker(1)
    b.relay._peer = Peer(PEER.secret, PEER.model, timeout=5.0, capacity=10)  # of its senders, made below
    try:
        together(
            lambda: a.compute(truth, Part(stage(chain, 0, 8, b.relay.address), a.order, None, (0, 8)), 0, 8),
            lambda: b.compute(truth, Part(stage(chain, 8, 16, a.relay.address), b.order, (0, 8), (0, 16)), 8, 16),
        )
        assert b.holds(truth, 16)
        assert b.relay.counted["bytes_sent"] == 0
    finally:
        a.relay.close()
        b.relay.close()


def test_neighbours_are_bounded(workers, monkeypatch):
    """As many as a client may name: idle ones make room; where none is idle, the chain is left to compute itself."""
    monkeypatch.setattr("forerun.runahead.relay._NEIGHBOURS", 1)
    a, truth = Worker(0), make_truth(8)
    try:
        for worker in workers[:2]:
            chain = os.urandom(16)
            a.compute(truth, Part(stage(chain, 0, 8, worker.relay.address), a.order, None, (0, 8)), 0, 8)
            assert worker.relay.receiver.mailbox.take(chain, LAYERS - 1, 0, 8, 5.0)
            (sender,) = a.relay._senders.values()
            assert sender.flush(5)
        lost = Part(stage(os.urandom(16), 0, 8, ("127.0.0.1", 9)), a.order, None, (0, 8))
        a.compute(truth, lost, 0, 8)
        sent = a.relay.counted["bytes_sent"]
        a.compute(truth, Part(stage(os.urandom(16), 0, 8, workers[0].relay.address), a.order, None, (0, 8)), 0, 8)
        assert a.relay.counted["bytes_sent"] == sent
        assert len(a.relay._senders) == 1
    finally:
        a.relay.close()


def test_what_was_computed_from_another_requests_failed_load_is_not_sent(workers):
    """Two requests of one step share a prefix whose load fails: the second's own tokens are as false as the first's."""
    b, c, one, two = Worker(5, timeout=0.2), workers[2], os.urandom(16), os.urandom(16)
    loads = Part(stage(one, 8, 12), b.order[:3], (0, 8), None)
    sends = Part(stage(two, 0, 12, c.relay.address), [*b.order[:2], b.order[5]], None, (8, 12))
    try:
        b.relay.begin([sends, loads], [])
        for layer in range(LAYERS):
            b.relay.layer(layer)
        assert c.relay.receiver.mailbox.take(two, 0, 8, 12, 5.0)  # written before anything failed
        assert c.relay.receiver.mailbox.take(two, 1, 8, 12, 0.3) is None
        assert b.relay.take_failed_blocks() == set(b.order[:2])
        b.relay.begin([loads], [])  # asked again before it is over: as lost as before
        assert b.relay.take_failed_blocks() == set(b.order[:2])
        assert b.relay.take_failed() == {one}  # once
    finally:
        b.relay.close()


def test_after_a_failed_load_nothing_false_is_sent():
    truth, chain = make_truth(24), os.urandom(16)
    a, b, c = (Worker(seed, timeout=0.3) for seed in range(3))
    try:
        first = Part(stage(chain, 0, 8, b.relay.address), a.order, None, (0, 8))
        a.relay.begin([first], [])
        for token in range(8):
            a.caches[0][a.order[token // BLOCK], :, token % BLOCK] = truth[0][:, token]
        a.relay.layer(0)  # and no more
        middle = Part(stage(chain, 8, 16, c.relay.address), b.order, (0, 8), (0, 16))
        together(
            lambda: b.compute(truth, middle, 8, 16),
            lambda: c.compute(truth, Part(stage(chain, 16, 24), c.order, (0, 16), None), 16, 24),
        )
        for worker, blocks in ((b, b.order[:2]), (c, c.order[:4])):
            assert worker.relay.take_failed_blocks() == set(blocks)
            assert worker.relay.take_failed() == {chain}
            assert worker.relay.waited < 1.0  # once, not for every layer
        assert a.relay.take_failed_blocks() == set()
    finally:
        for worker in (a, b, c):
            worker.relay.close()
