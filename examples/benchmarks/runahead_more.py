"""Chains longer than the machine has cores: rehearsed with injected sleeps, and by the recurrence."""

from __future__ import annotations

from typing import Any

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import search
from forerun.runahead.rehearsal import rehearse
from forerun.runahead.table import make_table

__all__ = ["more"]

_TOKENS = (2048, 8192)
_FAST = Link(float("inf"))
_SHARES = ((0.5, 0.3, 0.2), (0.4, 0.35, 0.25), (0.45, 0.3, 0.25), (0.6, 0.25, 0.15), (1 / 3, 1 / 3, 1 / 3))


def more(table: dict[str, Any]) -> dict[str, Any]:
    """Rows of engines, tokens and seconds, by the cost of a measured `table`.

    "rehearsed": measured, with sleeps in place of computation; "predicted": by the recurrence.
    """
    told, block = table["chain"], table["block"]
    chain = Chain(Cost(**told["cost"]), _FAST, told["layers"], told["kv_bytes"], told["before"])
    rows = []
    for engines in (2, 3):
        for tokens in _TOKENS:
            contexts = search(chain, tokens, engines, fewest=engines, block=block).contexts
            rows.append(_row("searched", chain, contexts, block))
    tokens = 4096
    apart = make_table(chain, _TOKENS, 3, model="", hardware="", block=block).split(tokens).contexts
    rows.append(_row("interpolated", chain, apart, block))
    rows.append(_row("searched", chain, search(chain, tokens, 3, fewest=3, block=block).contexts, block))
    for shares in _SHARES:
        first, second = (round(share * tokens / block) * block for share in shares[:2])
        rows.append(_row("picked", chain, (first, second, tokens - first - second), block))
    for engines in (4, 8):
        for tokens in (4096, 8192, 16384):
            split = search(chain, tokens, engines, block=block)
            rows.append(
                {
                    "way": "searched",
                    "contexts": list(split.contexts),
                    "predicted": split.ttft,
                    "speedup": split.speedup,
                    "rehearsed": None,
                }
            )
    return {"rows": rows}


def _row(way: str, chain: Chain, contexts: tuple[int, ...], block: int) -> dict[str, Any]:
    predicted = float(chain.ttft(contexts))
    rehearsed = min(rehearse(chain, contexts, block=block).ttft for _ in range(2))
    print(f"{way} {'+'.join(map(str, contexts))}: rehearsed {rehearsed:.3f} s, predicted {predicted:.3f} s", flush=True)
    speedup = chain.single(sum(contexts)) / rehearsed
    return {
        "way": way,
        "contexts": list(contexts),
        "predicted": predicted,
        "rehearsed": rehearsed,
        "speedup": speedup,
        "error": predicted / rehearsed - 1,
    }
