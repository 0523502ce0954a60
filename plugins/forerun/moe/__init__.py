"""Speculative MoE: experts and tokens that belong together on one rank, before the router has spoken.

Expert parallelism sends each token to the ranks of its experts and back. Which experts a token takes can be predicted
from its id: experts that the same tokens take are put on the same rank (*grouping*), and tokens are sent there in a
collective that runs anyway (*shuffling*). What is mispredicted goes the normal way, so the result stays the same.

    identity.py   which model a profile or a plan is of
    profile.py    counts by layer, token and expert, and a sample of whole paths; files.py how they are kept
    task.py       one layer's table, ranks and limits of both loads; homes.py tokens' ranks for a placement
    grouping.py   experts onto ranks: exact.py few of them, local_search.py many, on a table that coarsen.py
                  made smaller
    balance.py    copies of experts so that ranks compute alike, wherever tokens are
    predict.py    what a token id says of its experts; lookback.py what its last layers add
    shuffle.py    a batch's tokens to ranks, in even chunks, and back
    dispatch.py   destinations, rows and bytes that a placement costs
    exchange.py   tokens to their experts' ranks and back over a process group, each token to a rank once; overlap.py
                  back as sums, local experts computed meanwhile
    foresight.py, scatter.py   which rank a token goes to, layer by layer; the all-reduce in two halves that brings it
    alternation.py   two ways by turns, and the sooner one from then on
    requests.py   `forerun.moe.assign`: requests to data-parallel ranks
    planning.py   all of it, for every layer; plan.py the file; check.py whether a file's arrays fit; report.py what it
                  promises
    transformers.py   profiles of transformers models
    move.py       experts from rank to rank in bounded memory; agreement.py all ranks go on, or none does
    deepspeed.py  `speculate`, `unspeculate`, `apply`: DeepSpeed's AutoEP and classic layers, in place; its docstring
                  lists the files beside it
    sglang.py     SGLang's expert parallelism; sglang_config.py the section of FORERUN_SGLANG, sglang_spread.py a
                  layer's way; choice.py what it is expected to take beside sums over all ranks, sglang_batches.py the
                  way of each batch; sglang_location.py a plan for SGLang's own option
    commands.py, demo.py   `forerun moe profile | plan | show`, `forerun demo`

Axes: L MoE layers, E experts, k experts of a token, R ranks, N token ids, n tokens of a batch, P paths.

Source: Speculative MoE, arXiv 2503.04398.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forerun.moe.requests import assign

__all__ = ["assign"]


def __getattr__(name: str) -> Any:
    """`assign`, loaded when it is asked for: the room itself loads nothing heavy."""
    if name != "assign":
        raise AttributeError(f"module 'forerun.moe' has no attribute {name!r}")
    from forerun.moe.requests import assign

    return assign
