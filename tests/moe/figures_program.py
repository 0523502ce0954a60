"""One rank of DeepSpeed, attention tensor-parallel: a prompt's rows and local pairs by layer, beside the formula's.

    python figures_program.py MODEL RANK RANKS STORE [stock]

MODEL is a folder of `sglang_models.make_model`. SGLang's tests hold its rows, bytes and local pairs to the same
formula, of the same model, plan and prompt. With "stock" it only asks DeepSpeed's own model. The exit status is 0 if
all agree.
"""

import sys

import torch
from deepspeed_program import joined as join
from folded_program import folded
from sglang_models import load, prompts
from sglang_plans import plan_of, sent

from forerun.moe.deepspeed import speculate
from forerun_adapters import deepspeed as host


def main(path, rank, ranks, store, *stock):
    join(rank, ranks, store)
    model = load(path)
    plan = plan_of(model, prompts([48] * 12, seed=9), ranks)
    (prompt,) = prompts([61], seed=2)
    expected = [(rows, pairs, local) for rows, _, pairs, local in sent(model, plan, prompt, rank, notes=0)]
    engine = folded(load(path), ranks, ranks)
    if not stock:
        speculate(engine, plan, exact=False)
    layers, chosen = [layer for _, _, layer in host.layers(engine.module)], []
    for layer in layers:
        layer.router.register_forward_hook(lambda _router, _inputs, output: chosen.append(output[1]))
    with torch.no_grad():
        engine(torch.tensor([prompt]))
    if stock:
        return
    ranks_of = [placed[experts.numpy()] for placed, experts in zip(plan.rank, chosen, strict=True)]
    local = [(mine.size, int((mine == rank).sum())) for mine in ranks_of]
    counted = [(layer.forerun_state.sent, *pairs) for layer, pairs in zip(layers, local, strict=True)]
    print("rows", *(rows for rows, *_ in counted), flush=True)
    assert counted == expected, (counted, expected)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
