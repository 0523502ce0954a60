"""One rank of a model whose attention is tensor-parallel and whose experts are spread: stock, shuffled, and undone.

    python folded_program.py FAMILY RANKS_OF_A_TENSOR_PARALLEL_GROUP RANK RANKS STORE

The exit status is 0 if all agree. Prints, for stock and for each way, bytes that left this rank.
"""

import sys

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed_program import answers, assert_same_weights, planned, weights
from deepspeed_program import joined as join
from moe_traffic import Traffic
from tiny_models import tiny

from forerun.moe.deepspeed import apply, register, speculate, unregister, unspeculate
from forerun_adapters import deepspeed as host


def folded(model, tensor_parallel, ranks, **sections):
    """The model with AutoTP's attention and AutoEP's layers in it."""
    specs = [
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "tensor_parallel": {
            "autotp_size": tensor_parallel,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        },
        "expert_parallel": {"enabled": True, "autoep_size": ranks, "use_grouped_mm": False},
        **sections,
    }
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    engine.eval()
    return engine


def decided(module):
    """Of each size of batches that has been tried, whether tokens are shuffled."""
    shuffles = [part.forerun_shuffle for part in module.modules() if hasattr(part, "forerun_shuffle")]
    sizes = shuffles[0].foresight._trial._sizes
    return {size: entry.ours for size, entry in sizes.items() if entry.ours is not None}


def main(family, tensor_parallel, rank, ranks, store):
    join(rank, ranks, store)
    bare = tiny(family)
    plan = planned(bare, ranks)
    engine = folded(bare, tensor_parallel, ranks)
    module = engine.module
    before = weights(module)
    kinds = [type(part) for part in module.modules()]
    # The ranks of a tensor-parallel group have the same tokens; one sequence, so that decoding has fewer than ranks.
    generator = torch.Generator().manual_seed(rank // tensor_parallel)
    ids = torch.randint(0, 128, (1, 21), generator=generator)
    with torch.no_grad():
        engine(ids)
    with Traffic() as stock_bytes:
        stock, said = answers(engine, module, ids)
    print("stock", stock_bytes.total, flush=True)
    for name, settings in {
        "alone": {},
        "in order": {"plan": plan, "shuffle": False},
        "shuffled": {"plan": plan},
        "sums": {"plan": plan, "exact": False},
    }.items():
        speculate(engine, **settings)
        with Traffic() as ours:
            logits, tokens = answers(engine, module, ids)
        print(name.replace(" ", "-"), ours.total, flush=True)
        difference = (logits - stock).abs().max()
        assert difference <= 1e-4 * stock.abs().max(), f"{name}: {difference}"
        assert torch.equal(tokens, said), name
        with pytest.raises(ValueError, match="speculated already"):
            speculate(engine)
        assert_same_weights(module, before)  # as a checkpoint has them
        with torch.no_grad():  # embeddings from outside: no token ids
            unknown = module(inputs_embeds=module.get_input_embeddings()(ids) * 1).logits
        assert (unknown - stock).abs().max() <= 1e-4 * stock.abs().max()
        for other in (None, plan):
            apply(engine, other)
            with torch.no_grad():
                assert (engine(ids).logits - stock).abs().max() <= 1e-4 * stock.abs().max()
        unspeculate(engine)
        assert_same_weights(module, before)
        assert [type(part) for part in module.modules()] == kinds
    with pytest.raises(ValueError, match="a part of the tokens"):
        speculate(engine, count=True)
    speculate(engine, plan, trial=3)
    logits, tokens = answers(engine, module, ids)
    assert torch.equal(tokens, said)
    with torch.no_grad():
        for _ in range(8):
            assert (engine(ids).logits - stock).abs().max() <= 1e-4 * stock.abs().max()
    kept = decided(module)
    assert len(kept) == 2  # of batches like the prompt, and of single tokens
    told = [None] * ranks
    dist.all_gather_object(told, kept)
    mine = rank // tensor_parallel * tensor_parallel
    assert all(one == kept for one in told[mine : mine + tensor_parallel])
    unspeculate(engine)
    with torch.no_grad():
        assert torch.equal(engine(ids).logits, stock)
    register()
    configured = folded(tiny(family), tensor_parallel, ranks, speculative_moe={"enabled": True})
    unregister()
    assert all(layer.forerun_state.trial is None for _, _, layer in host.layers(configured.module))  # shuffles alone
    with torch.no_grad():
        assert (configured(ids).logits - stock).abs().max() <= 1e-4 * stock.abs().max()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
