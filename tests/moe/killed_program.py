"""One rank of a speculated AutoEP model over gloo that generates; the last rank is killed after a few tokens.

    python killed_program.py RANK RANKS STORE

Rank 0 prints how many tokens it had and how many seconds the error took, and ends with it.
"""

import os
import signal
import sys
import time

import torch
from deepspeed_program import expert_parallel, joined, planned
from tiny_models import tiny

from forerun.moe.deepspeed import speculate

STEPS = 5


def main(rank, ranks, store):
    joined(rank, ranks, store)
    model = tiny("Qwen3Moe")
    plan = planned(model, ranks)
    model = expert_parallel(model, "Qwen3Moe", "bare", ranks)
    speculate(model, plan)
    tokens, start = [], time.monotonic()

    def each(_ids, scores):
        tokens.append(1)
        if len(tokens) == STEPS and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores

    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.ones_like(ids)
    try:
        model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, logits_processor=[each])
    finally:
        print("tokens", len(tokens), "seconds", round(time.monotonic() - start), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), sys.argv[3])
