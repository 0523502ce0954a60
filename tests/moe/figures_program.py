"""One rank of DeepSpeed, attention tensor-parallel: the rows that each layer sends for a prompt, beside the formula's.

    python figures_program.py MODEL RANK RANKS STORE [stock]

MODEL is a folder of `sglang_models.make_model`. SGLang's tests hold its rows and bytes to the same formula, of the same
model, plan and prompt. With "stock" it only asks DeepSpeed's own model. The exit status is 0 if all agree.
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
    expected = [rows for rows, _ in sent(model, plan, prompt, rank, notes=0)]
    engine = folded(load(path), ranks, ranks)
    if not stock:
        speculate(engine, plan, exact=False)
    with torch.no_grad():
        engine(torch.tensor([prompt]))
    if stock:
        return
    counted = [layer.forerun_state.sent for _, _, layer in host.layers(engine.module)]
    print("rows", *counted, flush=True)
    assert counted == expected, (counted, expected)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
