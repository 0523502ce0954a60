"""One rank of a small classic model that goes on serving over gloo while plans, counts and checkpoints change.

    python online_program.py WHAT RANK RANKS STORE

WHAT is "all", or "die": the last rank kills itself while experts are moved. The exit status is 0 if all agree.
"""

import copy
import dataclasses
import os
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from classic_models import EXPERTS, classic
from classic_program import assert_same_weights, logits, planned, weights
from deepspeed_program import joined

from forerun.moe import deepspeed_state, move
from forerun.moe.deepspeed import apply, counts, sent_rows, speculate, unspeculate
from forerun.moe.profile import merge

SETTINGS = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False}


def turned(plan, by=1):
    """The plan with every expert on another rank."""
    other = copy.copy(plan)
    object.__setattr__(other, "rank", np.roll(plan.rank, by, axis=1))
    return other


def main(what, rank, ranks, store):
    joined(rank, ranks, store)
    model = classic(ranks, **SETTINGS)
    ids = torch.randint(0, 64, (2, 7 + 2 * rank), generator=torch.Generator().manual_seed(rank))
    before, stock = weights(model), logits(model, ids)
    plan = planned(model, None)
    if what == "die":
        killed_while_moving(model, plan, rank, ranks)
        return
    replanned(model, plan, ids, stock, before, ranks)
    bounded(model, plan, before)
    counted(model, ids, rank)
    tried(model, plan, ids, stock, before)
    refused(model, plan, before, rank)
    dist.barrier()
    dist.destroy_process_group()
    print("done", flush=True)


def replanned(model, plan, ids, stock, before, ranks):
    """Another plan, another one, then none: exact at every step, saved as stock in between."""
    speculate(model, plan)
    for applied in (turned(plan), plan):
        apply(model, applied)
        assert_same_weights(model, before)
        orders = [block.deepspeed_moe.forerun_state.order for block in model.blocks]
        lie = [list(range(EXPERTS)) if order is None else order.tolist() for order in orders]
        assert lie == applied.order.tolist()
        assert torch.equal(logits(model, ids), stock)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids)
    apply(model, None)
    assert torch.equal(logits(model, ids), stock)
    unspeculate(model)
    assert_same_weights(model, before)
    with pytest.raises(ValueError, match="ClassicLM is not speculated"):
        apply(model, plan)


def bounded(model, plan, before):
    """Experts move in pieces of few bytes, in buffers that are no larger."""
    speculate(model)
    layer = model.blocks[0].deepspeed_moe
    sizes, stock = [], dist.all_to_all_single

    def measured(received, sent, *arguments, **named):
        sizes.append(received.numel() + sent.numel())
        return stock(received, sent, *arguments, **named)

    order = torch.from_numpy(plan.order[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move.dist, "all_to_all_single", measured)
        left = deepspeed_state.lay(layer, order, most=256)
    each = EXPERTS // dist.get_world_size()
    home = torch.arange(EXPERTS) // each
    away = int(((home == dist.get_rank()) & (home[order.argsort()] != home)).sum())
    size = sum(p.numel() * p.element_size() for p in layer.experts.deepspeed_experts[0].state_dict().values())
    assert left == away * size
    assert len(sizes) > 5
    assert max(sizes) <= 256
    unspeculate(model)
    assert_same_weights(model, before)


def counted(model, ids, rank):
    """Every token of every layer, padding left out, to be merged with other ranks'."""
    speculate(model, count=True)
    logits(model, ids)
    with torch.no_grad():
        model(input_ids=ids)
    profile = counts(model)
    assert profile.counts.sum() == 2 * ids.numel() * len(model.blocks) * SETTINGS["k"]
    assert len(profile.paths.token) == 2 * ids.numel()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, profile)
    assert merge(*everyone).counts.sum() == sum(part.counts.sum() for part in everyone)
    unspeculate(model)
    speculate(model)
    with pytest.raises(ValueError, match="ClassicLM does not count"):
        counts(model)
    unspeculate(model)


def tried(model, plan, ids, stock, before):
    """Over a link that is slow by the byte ours is kept; slow by the message stock's, and it is said once."""
    real = dist.all_to_all_single

    def slow(by_message, by_byte):
        def delayed(received, sent, *arguments, **named):
            time.sleep(by_message + by_byte * sent.numel() * sent.element_size())
            return real(received, sent, *arguments, **named)

        return delayed

    from deepspeed import comm

    for by_message, by_byte, stays in ((0, 1e-5, True), (0.05, 0, False)):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patch.setattr(dist, "all_to_all_single", slow(by_message, by_byte))
            patch.setattr(comm, "all_to_all_single", slow(by_message, by_byte))
            speculate(model, plan, count=True, trial=1)
            went = [goes(model, ids, stock) for _ in range(6)]
            assert went == [True, False] * 2 + [stays] * 2
            said = [str(warning.message) for warning in told if "DeepSpeed's own exchange is kept" in str(warning)]
            assert len(said) == (0 if stays else 1)
            # Whichever way a pass goes, it is counted; another plan is tried anew.
            assert counts(model).counts.sum() == 6 * ids.numel() * len(model.blocks) * SETTINGS["k"]
            apply(model, turned(plan), trial=1)
            assert [goes(model, ids, stock) for _ in range(5)] == [True, False] * 2 + [stays]
        unspeculate(model)
        assert not any(hasattr(part, "forerun_state") for part in model.modules())
        assert_same_weights(model, before)


def goes(model, ids, stock):
    """Whether a pass, whose answer is stock's, goes our way."""
    before = torch.tensor(sent_rows(model))
    assert torch.equal(logits(model, ids), stock)
    after = torch.tensor(sent_rows(model))
    dist.all_reduce(before)
    dist.all_reduce(after)
    return bool(after > before)


def refused(model, plan, before, rank):
    """What is wrong on one rank alone is an error on all, and nothing is changed."""
    another = dataclasses.replace(plan.identity, model="somebody's")
    wrong = copy.copy(plan)
    object.__setattr__(wrong, "identity", another)
    with pytest.raises(ValueError, match=r"somebody's.*ClassicLM"):
        speculate(model, wrong if rank == 1 else plan)
    with pytest.raises(ValueError, match="ranks were given different plans or options"):
        speculate(model, turned(plan, rank))
    with pytest.raises(ValueError, match="ranks were given different plans or options"):
        speculate(model, plan, exact=rank == 0)
    expected = copy.copy(plan)  # experts in the same places, tokens expected elsewhere
    object.__setattr__(expected, "prior", plan.prior[:, ::-1].copy())
    with pytest.raises(ValueError, match="ranks were given different plans or options"):
        speculate(model, expected if rank == 1 else plan)
    assert not any(hasattr(part, "forerun_state") for part in model.modules())
    speculate(model)
    with pytest.raises(ValueError, match="speculated already"):
        speculate(model, plan)
    with pytest.raises(ValueError, match=r"somebody's.*ClassicLM"):
        apply(model, wrong if rank == 1 else plan)
    with pytest.raises(ValueError, match="ranks were given different plans or options"):
        apply(model, plan, background=rank == 1)
    unspeculate(model)
    assert_same_weights(model, before)


def killed_while_moving(model, plan, rank, ranks):
    """The last rank dies between two pieces: the others say so at once, and again whenever they are asked."""
    speculate(model, plan)
    pieces, stock = [], dist.all_to_all_single

    def dying(*arguments, **named):
        pieces.append(1)
        if len(pieces) == 2 and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*arguments, **named)

    move.dist.all_to_all_single = dying
    try:
        apply(model, turned(plan))
    except RuntimeError:
        print("lost", flush=True)
    for use in (
        lambda: logits(model, torch.ones(1, 4, dtype=torch.long)),
        model.state_dict,
        lambda: unspeculate(model),
    ):
        with pytest.raises(RuntimeError, match=r"deepspeed_moe: a rank failed while experts were moved"):
            use()
    print("told", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4])
