"""One rank of small models whose experts move to other ranks over gloo while forward passes go on.

    python background_program.py WHAT RANK RANKS STORE

WHAT is "groups": classic layers over two ranks of four, then over all; or "all": over all ranks, then AutoEP layers,
and in the end the last rank kills itself while a piece is on its way. The exit status is 0 if all agree.
"""

import contextlib
import os
import signal
import sys
from functools import partial

import deepspeed_program as autoep
import pytest
import torch
import torch.distributed as dist
from classic_models import classic
from classic_program import assert_same_weights, logits, planned, weights
from deepspeed_program import joined
from online_program import SETTINGS, turned
from tiny_models import tiny

from forerun.moe import deepspeed_state
from forerun.moe.background import Background
from forerun.moe.deepspeed import apply, moving, speculate, unspeculate
from forerun.moe.move import Route
from forerun_adapters import deepspeed as host

PIECES = 4096  # bytes of both buffers: several pieces of every weight


@contextlib.contextmanager
def small_pieces(late=0):
    """Within, two experts are fetched at once, piece by piece; rank 1 has each once it has asked so often in vain."""

    class Late:
        def __init__(self, work):
            self.work, self.left = work, late

        def is_completed(self):
            self.left -= 1
            return self.left < 0 and self.work.is_completed()

        def wait(self):
            self.work.wait()

    sent, real = [], Route.exchange

    def counted(route, parts, group, *, later=False):
        received, work = real(route, parts, group, later=later)
        if later:
            sent.append(2 * received.numel())
            if late and dist.get_rank(group) == 1:
                work = Late(work)
        return received, work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_state, "Background", partial(Background, most=PIECES, staged=0))
        patch.setattr(Route, "exchange", counted)
        yield sent


def here(model):
    """What this rank holds at its places."""
    module = getattr(model, "module", model)
    return [tensor.clone() for entry in host.layers(module) for held in host.weights(entry.layer) for tensor in held]


def orders(model):
    """Of each layer, the expert at each place."""
    layers = [entry.layer for entry in host.layers(getattr(model, "module", model))]
    held = [(layer.forerun_state.order, host.experts_of(layer)) for layer in layers]
    return [list(range(experts)) if order is None else order.tolist() for order, experts in held]


def staged(model):
    """Pieces that wait beside a model's weights: their bytes, which need not be alike on all ranks."""
    moves = {entry.layer.forerun_state.move for entry in host.layers(getattr(model, "module", model))} - {None}
    return [received.numel() for move in moves for _, received in move.staged]


def moved_at_once(model, first, second):
    speculate(model, first)
    apply(model, second)
    held = here(model)
    unspeculate(model)
    return held


def passes(model, answer, expected, group):
    """Forward passes until all experts lie where they shall, stock's answer and the same order on all ranks at each."""
    count, most = 0, 0
    while moving(model):
        assert torch.equal(answer(), expected)
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (orders(model), moving(model)), group=group)
        assert all(one == everyone[0] for one in everyone)
        count, most = count + 1, max(most, sum(staged(model)))
    assert not staged(model)
    assert all(entry.layer.forerun_state.move is None for entry in host.layers(getattr(model, "module", model)))
    return count, most


def goes_on(model, plan, other, answer):
    """Exact while experts move, the old order first, and little is held beside; then as if they had moved at once."""
    layer = host.layers(getattr(model, "module", model))[0].layer
    group, expected, whole = layer.ep_group, answer(), moved_at_once(model, plan, other)
    size = sum(held[0].numel() * held[0].element_size() for held in host.weights(layer))
    for late in (0, 1):
        speculate(model, plan)
        was = orders(model)
        assert not moving(model)
        with small_pieces(late) as sent:
            apply(model, other, background=True)
            assert moving(model) == len(was)
            assert orders(model) == was
            assert torch.equal(answer(), expected)
            assert orders(model) == was
            count, most = passes(model, answer, expected, group)
        assert (1 + count) * len(was) > len(sent) * (1 + late)
        assert len(sent) > 10
        assert max(sent) <= PIECES
        assert 0 < most <= 2 * size
        assert orders(model) == other.order.tolist()
        assert all(torch.equal(*both) for both in zip(here(model), whole, strict=True))
        assert torch.equal(answer(), expected)
        unspeculate(model)


def interrupted(model, plan, other, answer, before, same):
    """In the middle of a move: undone; another plan at once or beside; saved; loaded; gradients asked for."""
    module = getattr(model, "module", model)
    group, expected, whole = host.layers(module)[0].layer.ep_group, answer(), moved_at_once(model, plan, other)

    @contextlib.contextmanager
    def middle():
        speculate(model, plan)
        with small_pieces() as sent:
            apply(model, other, background=True)
            while not staged(model) or len(sent) < 12:
                answer()
            assert moving(model)
            yield
        unspeculate(model)
        same(module, before)
        assert torch.equal(answer(), expected)

    with middle():
        unspeculate(model)
        same(module, before)
        speculate(model)
    for background in (False, True):
        with middle():
            apply(model, plan, background=True)
            answer()
            apply(model, other, background=background)
            assert bool(moving(model)) is background
            passes(model, answer, expected, group)
            assert all(torch.equal(*both) for both in zip(here(model), whole, strict=True))
    with middle():
        same(module, before)
        changed = {name: value + 1 if "experts" in name else value for name, value in before.items()}
        answer()
        module.load_state_dict(changed, strict=False)
        assert moving(model)
        while moving(model):
            answer()
        same(module, changed)
        module.load_state_dict(before, strict=False)
    with middle():
        apply(model, None, background=True)
        with pytest.raises(RuntimeError, match="no_grad"):
            module(torch.ones(1, 4, dtype=torch.long))
        passes(model, answer, expected, group)
        assert all(order == sorted(order) for order in orders(model))
    with middle():
        apply(model, other, background=True, trial=2)
        states = [entry.layer.forerun_state for entry in host.layers(module)]
        assert all(state.trial is None for state in states)
        while moving(model):
            answer()
        assert any(state.trial is not None for state in states)


def engine_saves(rank, ranks, store):
    """AutoEP under DeepSpeed's engine: exact on its way, and its checkpoints are stock's in the middle."""
    bare = tiny("Qwen3Moe")
    plan = autoep.planned(bare, ranks)
    engine = autoep.expert_parallel(bare, "Qwen3Moe", "engine", ranks)
    before, ids = autoep.weights(engine.module), torch.randint(0, 128, (2, 7 + rank))

    @torch.no_grad()
    def answer():
        return engine(ids).logits

    expected = answer()
    goes_on(engine, plan, turned(plan), answer)
    speculate(engine, plan)
    with small_pieces():
        apply(engine, turned(plan), background=True)
        while not staged(engine):
            answer()
        autoep.assert_saved_and_loaded_as_stock(engine, engine.module, before, expected, ids, store + "-saved")
        assert moving(engine)
        passes(engine, answer, expected, None)
    unspeculate(engine)
    autoep.assert_same_weights(engine.module, before)


def failing(rank, plan, ids):
    """A rank that cannot send: all ranks are told in the next call of a layer, and whenever they ask again."""
    model = classic(dist.get_world_size(), **SETTINGS)
    speculate(model, plan)
    real = Route.exchange

    def full(*arguments, **named):
        if rank == 1:
            raise MemoryError("full")
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "exchange", full)
        apply(model, turned(plan), background=True)
        with pytest.raises(RuntimeError, match="a rank failed while experts were moved") as told:
            logits(model, ids)
    assert isinstance(told.value.__cause__, MemoryError if rank == 1 else type(None))
    for use in (lambda: logits(model, ids), model.state_dict, lambda: unspeculate(model), lambda: apply(model, plan)):
        with pytest.raises(RuntimeError, match=r"deepspeed_moe: a rank failed while experts were moved"):
            use()


def killed(rank, ranks, plan, ids):
    """The last rank dies while a piece travels: the others' forward pass says so, and they can end."""
    model = classic(ranks, **SETTINGS)
    speculate(model, plan)
    with small_pieces() as sent:
        apply(model, turned(plan), background=True)
        with pytest.raises(RuntimeError):
            while moving(model):
                logits(model, ids)
                if len(sent) > 4 and rank == ranks - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    print("lost", moving(model) > 0, flush=True)
    for use in (lambda: logits(model, ids), model.state_dict, lambda: unspeculate(model)):
        with pytest.raises(RuntimeError, match=r"deepspeed_moe: a rank failed while experts were moved"):
            use()
    print("told", flush=True)


def main(what, rank, ranks, store):
    joined(rank, ranks, store)
    ids = torch.randint(0, 64, (2, 7 + 2 * rank), generator=torch.Generator().manual_seed(rank))
    for group in (2, 4) if what == "groups" else (ranks,):
        model = classic(group, **SETTINGS)
        plan = planned(model, model.blocks[0].deepspeed_moe.ep_group)
        other, answer = turned(plan), partial(logits, model, ids)
        goes_on(model, plan, other, answer)
        interrupted(model, plan, other, answer, weights(model), assert_same_weights)
    if what == "all":
        engine_saves(rank, ranks, store)
        failing(rank, plan, ids)
        killed(rank, ranks, plan, ids)
        return
    speculate(model, plan)
    apply(model, other, background=True)
    answer()
    assert moving(model)
    dist.destroy_process_group()  # in the middle of a move
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4])
