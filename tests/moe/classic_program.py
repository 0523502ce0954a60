"""One rank of small classic `deepspeed.moe` models over gloo: stock, speculated without and with a plan, and undone.

    python classic_program.py CASES RANKS_OF_A_GROUP RANK RANKS STORE

CASES are names of `CASES`, by commas. The exit status is 0 if all agree; prints rows sent by case.
"""

import sys

import torch
import torch.distributed as dist
from classic_models import EXPERTS, classic
from deepspeed_program import joined

from forerun.moe.deepspeed import counts, identify, sent_rows, speculate, unspeculate
from forerun.moe.planning import make_plan
from forerun.moe.profile import merge

CASES = {
    "top-1": {"k": 1, "drop_tokens": False},
    "top-2": {"k": 2, "drop_tokens": False},
    "top-3": {"k": 3, "drop_tokens": False, "top2_2nd_expert_sampling": False},
    "dropping": {"k": 2, "eval_capacity_factor": 0.6, "min_capacity": 0, "top2_2nd_expert_sampling": False},
    "dropping top-1": {"k": 1, "eval_capacity_factor": 0.7, "min_capacity": 0, "use_rts": True},
    "dropping top-3": {"k": 3, "eval_capacity_factor": 0.6, "min_capacity": 0},
    "residual": {"k": 2, "drop_tokens": False, "use_residual": True, "noisy_gate_policy": "RSample"},
    "bfloat16": {"k": 2, "drop_tokens": False, "dtype": torch.bfloat16},
    "float16": {"k": 4, "drop_tokens": False, "dtype": torch.float16},
    "init_inference": {"k": 2, "drop_tokens": False, "parallel": False},
}


@torch.no_grad()
def greedy(model, ids, steps):
    torch.manual_seed(5)  # gates may sample
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids


@torch.no_grad()
def logits(model, *inputs):
    torch.manual_seed(5)
    return model(*inputs)


def planned(model, group):
    """A plan of what the model's own tokens take, counted while it serves."""
    speculate(model, count=True)
    for seed in range(3):
        ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(10 * dist.get_rank() + seed))
        logits(model, ids)
    profile = counts(model)
    unspeculate(model)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, profile, group=group)
    return make_plan(merge(*everyone), dist.get_world_size(group), effort=2)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model, before):
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def inferring(model):
    import deepspeed

    settings = {"dtype": torch.float32, "moe": {"enabled": True, "ep_size": dist.get_world_size()}}
    return deepspeed.init_inference(model, config={**settings, "replace_with_kernel_inject": False})


def run(name, ranks, rank):
    settings = CASES[name]
    model = classic(ranks, **settings)
    if name == "init_inference":
        model = inferring(model)
        # Its gates have no group, so that each rank pads to its own capacity: stock takes equal batches only.
        assert model.module.blocks[0].deepspeed_moe.ep_group is None
    module = getattr(model, "module", model)
    group = module.blocks[0].deepspeed_moe.ep_group
    generator = torch.Generator().manual_seed(0 if name == "init_inference" else rank)
    even = torch.randint(0, 64, (2, 9), generator=generator)
    uneven = torch.randint(0, 64, (2, 9 + 3 * rank), generator=generator)
    # Stock's exchange takes unequal batches if the gates agree on a capacity, and a top-1 gate cuts it to its own.
    given = (
        uneven if settings["k"] > 1 and not settings.get("drop_tokens", True) and "parallel" not in settings else even
    )
    before = weights(module)
    stock, said = logits(model, given), greedy(model, given[:, :5], 32 if name in ("top-2", "top-3") else 4)
    plan = planned(model, group)
    assert plan.identity == identify(model)
    assert not (plan.order == range(EXPERTS)).all(), "the plan moves nothing"
    for applied in (None, plan):
        speculate(model, applied)
        result = logits(model, given)
        assert torch.equal(result, stock), f"{name}, plan {applied is not None}: {(result - stock).abs().max()}"
        assert torch.equal(greedy(model, given[:, :5], said.shape[1] - 5), said)
        sent = sent_rows(model)
        if stock.dtype == torch.float32:
            alone(model, uneven, settings)
        unspeculate(model)
        assert_same_weights(module, before)
        speculate(model, applied, exact=False)
        if stock.dtype == torch.float32:  # the order of additions, and products of other numbers of rows
            assert (logits(model, given) - stock).abs().max() <= 1e-4 * stock.abs().max()
        unspeculate(model)
        assert_same_weights(module, before)
    assert torch.equal(logits(model, given), stock)
    assert not any(hasattr(part, "forerun_state") for part in module.modules())
    return sent


def alone(model, ids, settings):
    """Unequal batches, few tokens, none: as a model that has all its experts on one rank."""
    whole = classic(1, **{**settings, "parallel": True, "min_capacity": 0})
    for batch in (ids, ids[:1, : 1 + dist.get_rank()], ids[:, : 4 * (dist.get_rank() != 1)]):
        answer, expected = logits(model, batch), logits(whole, batch)
        assert answer.shape == expected.shape
        assert not answer.numel() or (answer - expected).abs().max() <= 1e-4 * expected.abs().max()


def main(cases, ranks, rank, world, store):
    joined(rank, world, store)
    for name in cases.split(","):
        print(name.replace(" ", "-"), run(name, ranks, rank), "rows", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
