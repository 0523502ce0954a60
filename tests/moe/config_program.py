"""One rank that turns speculation on by DeepSpeed's configuration alone, over gloo.

    python config_program.py check RANK RANKS STORE
    python -m forerun.moe.deepspeed config_program.py script RANK RANKS STORE

"check" goes through everything, then becomes the second command. The exit status is 0 if all is as it should.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from classic_models import classic
from classic_program import assert_same_weights, logits, planned, weights
from deepspeed_program import joined
from deepspeed_program import planned as planned_routers
from tiny_models import tiny

from forerun.moe.deepspeed import counts, register, sent_rows, unregister, unspeculate
from forerun_adapters import deepspeed as host

SETTINGS = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False, "parallel": False}
TRAINING = {"train_micro_batch_size_per_gpu": 2}


def ours(model):
    return [hasattr(found.layer, "forerun_state") for found in host.layers(getattr(model, "module", model))]


def fresh(ranks):
    # Not a copy: copied parameters forget which group they belong to.
    return classic(ranks, **SETTINGS)


def check(rank, ranks, store):
    joined(rank, ranks, store)
    folder, ids = Path(store).parent, torch.ones(2, 5 + rank, dtype=torch.long)
    bare = fresh(ranks)
    reference = classic(ranks, **{**SETTINGS, "parallel": True})
    expected, plan = logits(reference, ids), planned(reference, None)
    if rank == 0:
        plan.save(folder / "plan")
    section = {"enabled": True, "plan": str(folder / "plan"), "trial": 0}
    whole = {**TRAINING, "speculative_moe": section}
    inference = {"dtype": torch.float32, "moe": {"enabled": True, "ep_size": ranks}}
    path = folder / f"config-{rank}.json"
    path.write_text(json.dumps(whole))
    dist.barrier()

    stock = deepspeed.initialize, deepspeed.init_inference
    assert ours(deepspeed.initialize(model=fresh(ranks), config=dict(whole))[0]) == [False, False]
    register()
    register()
    engines = [
        deepspeed.initialize(model=fresh(ranks), config=dict(whole))[0],
        deepspeed.initialize(None, fresh(ranks), config=str(path))[0],
        deepspeed.initialize(argparse.Namespace(deepspeed_config=str(path), local_rank=rank), fresh(ranks))[0],
        deepspeed.init_inference(fresh(ranks), config={**inference, "speculative_moe": section}),
        deepspeed.init_inference(fresh(ranks), inference, speculative_moe={"enabled": True, "count": True}),
    ]
    for number, engine in enumerate(engines):
        engine.eval()
        assert ours(engine) == [True, True]
        answer = logits(engine, ids)
        # init_inference leaves gates without a group: each pads to its own capacity, so products have other sizes.
        same = torch.equal(answer, expected) if number < 3 else (answer - expected).abs().max() < 1e-4
        assert same, f"engine {number}: {(answer - expected).abs().max()}"
        assert sent_rows(engine) > 0
    assert counts(engines[-1]).counts.sum() > 0
    unspeculate(engines[0])
    assert_same_weights(engines[0].module, weights(bare))
    for nothing in ({"speculative_moe": {"enabled": False, "plan": "none"}}, {"speculative_moe": {}}, {}):
        assert ours(deepspeed.initialize(model=fresh(ranks), config={**TRAINING, **nothing})[0]) == [False] * 2
        assert ours(deepspeed.init_inference(fresh(ranks), config={**inference, **nothing})) == [False] * 2
    refused(bare, whole, inference, section, folder, rank)
    autoep(folder, rank, ranks)
    unregister()
    unregister()
    assert (deepspeed.initialize, deepspeed.init_inference) == stock
    dist.barrier()
    dist.destroy_process_group()


def refused(bare, whole, inference, section, folder, rank):
    """What is wrong, on all ranks or on one, is told on all before an engine is made."""
    other = classic(1, **SETTINGS)
    (folder / f"damaged-{rank}").write_bytes((folder / "plan").read_bytes()[:-9])
    wrong = {
        r"speculative_moe has exakt, plam; expected none but enabled, plan, exact, count, shuffle, trial": {
            "exakt": 1,
            "plam": 2,
        },
        r"speculative_moe: exact is 'yes'; expected true or false": {"exact": "yes"},
        r"speculative_moe: trial is -1; expected a number of passes": {"trial": -1},
        r"the plan cannot be read: .*nowhere": {"plan": "nowhere"},
        r"damaged-\d is not a plan": {"plan": str(folder / f"damaged-{rank}")},
        r"the plan cannot be read: .*only-one": {"plan": "only-one" if rank else section["plan"]},
    }
    before = weights(bare)
    for message, change in wrong.items():
        for start, config in ((deepspeed.initialize, whole), (deepspeed.init_inference, inference)):
            with pytest.raises(ValueError, match=message):
                start(model=bare, config={**config, "speculative_moe": {**section, **change}})
            assert bare.blocks[0].deepspeed_moe.ep_group is None
            assert_same_weights(bare, before)
    with pytest.raises(ValueError, match="speculative_moe is True; expected an object with enabled, plan"):
        deepspeed.initialize(model=bare, config={**whole, "speculative_moe": True})
    with pytest.raises(ValueError, match="the plan is for 2 ranks, not for 1"):
        deepspeed.initialize(model=other, config=dict(whole))
    with pytest.raises(ValueError, match=r"the plan is of 'ClassicLM'.* not of 'MixtralForCausalLM'"):
        deepspeed.initialize(model=tiny("Mixtral"), config=dict(whole))


def autoep(folder, rank, ranks):
    model = tiny("Qwen3Moe")
    if rank == 0:
        planned_routers(model, ranks).save(folder / "autoep-plan")
    dist.barrier()
    parallel = {"enabled": True, "autoep_size": ranks, "use_grouped_mm": False}
    section = {"enabled": True, "plan": str(folder / "autoep-plan"), "trial": 0}
    with pytest.raises(ValueError, match="the plan is for 2 ranks, not for 1"):
        config = {**TRAINING, "expert_parallel": {**parallel, "autoep_size": 1}, "speculative_moe": section}
        deepspeed.initialize(model=model, config=config)
    ids = torch.ones(1, 4 + rank, dtype=torch.long)
    with torch.no_grad():
        expected = model(ids).logits
        config = {**TRAINING, "expert_parallel": parallel, "speculative_moe": section}
        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        assert ours(engine) == [True] * 3
        assert (engine(ids).logits - expected).abs().max() < 1e-4


def script(rank, ranks, store):
    """Knows nothing of forerun: asks DeepSpeed for an engine by a configuration file."""
    joined(rank, ranks, f"{store}-again")
    engine, *_ = deepspeed.initialize(model=fresh(ranks), config=str(Path(store).parent / f"config-{rank}.json"))
    engine.eval()
    assert ours(engine) == [True, True]
    logits(engine, torch.ones(2, 5, dtype=torch.long))
    print("script", sys.argv[1], Path(sys.path[0]).name, sent_rows(engine), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = (int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    if sys.argv[1] == "script":
        script(*given)
    else:
        check(*given)
        again = [sys.executable, "-m", "forerun.moe.deepspeed", __file__, "script", *sys.argv[2:]]
        os.execv(sys.executable, again)
