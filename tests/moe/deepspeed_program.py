"""One rank of tiny AutoEP models over gloo: stock, speculated without and with a plan, and undone.

    python deepspeed_program.py FAMILIES DTYPES WAY RANK RANKS STORE

FAMILIES and as many DTYPES are separated by commas. WAY is "bare" (the layers replaced by hand) or "engine"
(deepspeed.initialize, with checkpoints beside STORE). The exit status is 0 if all agree; prints rows sent.
"""

import contextlib
import copy
import datetime
import os
import sys
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.utils import groups
from tiny_models import tiny

from forerun.moe import assign
from forerun.moe.deepspeed import sent_rows, speculate, unspeculate
from forerun.moe.identity import Identity
from forerun.moe.plan import Plan
from forerun.moe.planning import make_plan
from forerun.moe.profile import merge
from forerun.moe.transformers import profile_model
from forerun_adapters import deepspeed as host


def joined(rank, ranks, store):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)
    deepspeed.init_distributed("gloo", verbose=False)


def expert_parallel(model, family, way, ranks):
    """The model with AutoEP's layers in it, or the engine around it."""
    settings = {"enabled": True, "autoep_size": ranks, "use_grouped_mm": False}
    if family == "Olmoe":
        settings["preset_model"] = "mixtral"
    if way == "engine":
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        config = {"train_micro_batch_size_per_gpu": 2, "optimizer": optimizer, "expert_parallel": settings}
        engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
        engine.eval()
        return engine
    if f"ep_size_{ranks}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ranks)
    autoep = AutoEP(model, parse_autoep_config(settings))
    autoep.replace_moe_layers(autoep.ep_parser(), ep_size=ranks, ep_rank=dist.get_rank())
    for _, _, layer in host.layers(model):
        layer.set_deepspeed_parallelism()
    return model


def planned(model, ranks):
    generator = torch.Generator().manual_seed(0)
    texts = [[torch.randint(0, 128, (16,), generator=generator) for _ in range(30)] for _ in range(2)]
    return make_plan(merge(*(profile_model(model, text, seed=seed) for seed, text in enumerate(texts))), ranks)


def asked(rank):
    """`[B, S]` another number of prompts, of another length, on each rank."""
    return torch.randint(0, 128, (1 + rank % 3, 6 + 3 * rank), generator=torch.Generator().manual_seed(rank))


@torch.no_grad()
def answers(model, module, ids):
    """Logits, and 32 tokens greedily: as many forward passes on every rank, whatever its batch; none ends sooner."""
    said = module.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    assert said.shape == (len(ids), ids.shape[1] + 32)
    return model(ids).logits, said


@torch.no_grad()
def by_layer(module):
    """A layer's answer to no token on rank 1, to none at all, and to tokens that are all alike: to few ranks."""
    layer, rank = host.layers(module)[-1].layer, dist.get_rank()
    width = layer.router.gate.weight.shape[1]
    row = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(9)).to(layer.router.gate.weight.dtype)
    answers = [layer(row.expand(2, count, width).contiguous()) for count in (3 * (rank != 1), 0, 4)]
    return [answer[0] if isinstance(answer, tuple) else answer for answer in answers]


@torch.no_grad()
def said_to(requests, ranks_of, module):
    """What each request is answered, whichever rank answers it."""
    here = (ranks_of == dist.get_rank()).nonzero()[0]
    mine = requests[here]
    said = module.generate(
        mine, attention_mask=torch.ones_like(mine), pad_token_id=0, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, dict(zip(here.tolist(), said.tolist(), strict=True)))
    return [answer for _, answer in sorted(pair for part in every for pair in part.items())]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items() if "tokens_per_expert" not in name}


def assert_same_weights(module, before):
    after = weights(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def main(families, dtypes, way, rank, ranks, store):
    joined(rank, ranks, store)
    for family, dtype in zip(families.split(","), dtypes.split(","), strict=True):
        run(family, getattr(torch, dtype), way, rank, ranks, store)
    dist.barrier()
    dist.destroy_process_group()


def run(family, dtype, way, rank, ranks, store):
    bare = tiny(family).to(dtype)
    plan = planned(bare, ranks)
    model = expert_parallel(bare, family, way, ranks)
    module = getattr(model, "module", model)
    before = weights(module)
    ids = asked(rank)
    with routed(module) as chosen:
        stock, said = answers(model, module, ids)
    assert [len(calls) for calls in chosen] == [33] * len(host.layers(module))
    rows = stock_rows(module, chosen)
    stock_by_layer, sent = by_layer(module), {}
    for exact in (True, False):
        for applied in (None, plan):
            speculate(model, applied, exact=exact)
            if exact:
                with routed(module) as again:
                    logits, tokens = answers(model, module, ids)
                assert_same_experts(again, chosen)
                assert torch.equal(logits, stock), f"plan {applied is not None}: {(logits - stock).abs().max()}"
                assert torch.equal(tokens, said)
                sent[applied is not None] = sent_rows(model)
                if applied is not None:  # whoever owns the split gives each rank as many; the answers are the same
                    requests = torch.randint(0, 128, (4 * ranks, 8), generator=torch.Generator().manual_seed(9))
                    in_order, chosen = np.arange(4 * ranks) % ranks, assign(list(requests), plan, limit=1)
                    assert np.bincount(chosen).tolist() == [4] * ranks
                    assert dtype != torch.float32 or said_to(requests, in_order, module) == said_to(
                        requests, chosen, module
                    )
            elif dtype == torch.float32:
                # The order of additions. In bfloat16 a rounding may send a later layer's token to another expert, so
                # that only a layer's own error is bounded: exchange_program.py holds that.
                with torch.no_grad():
                    difference = (model(ids).logits - stock).abs().max()
                assert difference <= 1e-4 * stock.abs().max(), difference
            with pytest.raises(ValueError, match="speculated already"):
                speculate(model, applied)
            if exact:
                assert all(torch.equal(*both) for both in zip(by_layer(module), stock_by_layer, strict=True))
            if applied is not None:
                assert_saved_and_loaded_as_stock(model, module, before, stock, ids, f"{store}-{exact}")
                with pytest.raises(RuntimeError, match="no_grad"):
                    module(ids)
            unspeculate(model)
            assert_same_weights(module, before)
            assert not any(hasattr(part, "forerun_state") for part in module.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock)
    refused(model, module, plan, before)
    print("rows", family, sent[False], sent[True], rows, flush=True)


@torch.no_grad()
def assert_saved_and_loaded_as_stock(model, module, before, stock, ids, folder):
    """While experts lie by a plan: what is saved is stock's, and what is loaded is where it belongs."""
    assert any(not torch.equal(p.cpu(), before[n]) for n, p in module.named_parameters()), "the plan moved nothing"
    assert_same_weights(module, before)
    changed = {name: value + 1 if ".experts." in name else value for name, value in before.items()}
    module.load_state_dict(changed, strict=False)
    assert_same_weights(module, changed)
    assert not torch.equal(module(ids).logits, stock)
    module.load_state_dict(before, strict=False)
    assert torch.equal(model(ids).logits, stock) or not host.layers(module)[0].layer.forerun_state.exact
    if module is model:
        return
    model.save_checkpoint(folder, tag="planned")
    saved = torch.load(Path(folder) / "planned" / f"layer_0_expert_{dist.get_rank() * 4}_mp_rank_00_model_states.pt")
    assert len(saved) == 3
    assert all(torch.equal(value, before[name.rpartition(".")[0]][0]) for name, value in saved.items())
    module.load_state_dict(changed, strict=False)
    model.load_checkpoint(folder, tag="planned")
    assert_same_weights(module, before)
    assert torch.equal(model(ids).logits, stock) or not host.layers(module)[0].layer.forerun_state.exact


def refused(model, module, plan, before):
    """Plans of another model, and of another number of ranks: both are named, nothing is changed."""
    other = copy.copy(plan)
    object.__setattr__(other, "identity", Identity("somebody's", plan.identity.layers, 8, 2))
    with pytest.raises(ValueError, match=f"somebody's.*{type(module).__name__}"):
        speculate(model, other)
    ones = {name: getattr(plan, name)[..., :1] * 0 + 1 for name in ("share", "prior")}
    single = Plan(**{**plan.__dict__, **ones, "rank": plan.rank * 0, "ratio": plan.ratio[:, :1, :1, :1]})
    with pytest.raises(ValueError, match=f"the plan is for 1 ranks, not for {plan.ranks}"):
        speculate(model, single)
    assert_same_weights(module, before)
    assert not any(hasattr(part, "forerun_state") for part in module.modules())


@contextlib.contextmanager
def routed(module):
    """Within, the experts `[n, k]` that each layer's router chooses, call by call."""
    chosen, hooks = [], []
    for _, _, layer in host.layers(module):
        calls = []
        hooks.append(
            layer.router.register_forward_hook(lambda _router, _given, told, calls=calls: calls.append(told[1].clone()))
        )
        chosen.append(calls)
    yield chosen
    for hook in hooks:
        hook.remove()


def assert_same_experts(again, chosen):
    """Every token's, in every layer and call, in the same order."""
    for calls, before in zip(again, chosen, strict=True):
        assert all(torch.equal(*both) for both in zip(calls, before, strict=True))


def stock_rows(module, chosen):
    """Rows that stock AutoEP sends off this rank: one per (token, expert) whose expert is elsewhere."""
    each, here = host.layers(module)[0].layer.num_local_experts, dist.get_rank()
    return sum(int((experts // each != here).sum()) for calls in chosen for experts in calls)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]), sys.argv[6])
