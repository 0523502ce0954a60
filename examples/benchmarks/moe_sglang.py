"""Speculative MoE in SGLang's server on 2 and 4 ranks: its own expert parallelism, ours part by part and as turned on.

- stock: SGLang's `--tp R --ep R`, two sums over all ranks a layer.
- EPLB: stock with experts placed by their load, by SGLang's own EPLB (`--init-expert-location`, no copies).
- ours: tokens spread over the ranks, experts in their order.
- s-EG: experts grouped by a plan too.
- s-EG + s-TS: tokens sent where the plan expects their experts too.
- forerun: the same as it is turned on: each layer and batch takes the way that is expected to be sooner on this link,
  and is found to be.

Models are those of the DeepSpeed benchmark (`moe_models.py`); with `-dp` attention is data-parallel, and the tokens are
four requests' of a topic each instead of one's. They come while another one is answered, and so make one batch. Bytes
of a rank are counted at its port, both sides the same way, and by layer as forerun tells them. Ranks are nodes of one
server in network namespaces, joined by links without limit, of 1 Gbit/s and of 100 Mbit/s, which needs root; `--links
loopback` alone does not, but for data-parallel attention, whose nodes cannot share a host. Every way is asked by turns
with a server of stock's, the other one paused meanwhile, and stands beside what that one took then. A case that is run
replaces its own rows in `results/moe_sglang.json`; the picture shows all cases that are there.

    python examples/benchmarks/moe_sglang.py [--models planted] [--ranks 2] [--links loopback] [--repeats 7]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import moe_models
import numpy as np
import torch
from links import limit, namespaces, sent
from measurement import comparison, provenance
from moe_sglang_client import Client
from sglang_ranks import Ranks, versions
from transformers import Qwen3MoeForCausalLM

from forerun.moe.planning import make_plan
from forerun.moe.transformers import profile_model

_RESULTS = Path(__file__).parent / "results"
_FLAGS = (
    *("--max-running-requests", "16", "--max-total-tokens", "8192", "--chunked-prefill-size", "2048"),
    *("--disable-radix-cache", "--mem-fraction-static", "0.9"),  # of what another server has left
)
_APART = ("--boundary-reduction", "rs")  # what SGLang chooses otherwise is for NCCL alone
_SETTLES = 6  # batches after which a link's speed is known
_RATES = {"loopback": None, "1gbit": 1e9, "100mbit": 1e8}  # bits a second, each way of each rank
_SHAPES = {"random": "olmoe", "planted": "olmoe", "folded": "folded"}  # of the models
_WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "EPLB": None,
    "ours": {"choose": False},
    "s-EG": {"choose": False, "plan": True, "shuffle": False},
    "s-EG + s-TS": {"choose": False, "plan": True},
    "forerun": {"plan": True},
    "stock again": None,  # what both sides of the same differ by
}


def main(out: Path, options: argparse.Namespace) -> None:
    for name in options.models.split(","):
        model, apart = name.removesuffix("-dp"), name.endswith("-dp")
        shape = moe_models.SHAPES[options.shape or _SHAPES[model]]
        with tempfile.TemporaryDirectory() as folder:
            path = _made(Path(folder), model, shape)
            for ranks in map(int, options.ranks.split(",")):
                plan, load = _planned(path, Path(folder), shape, ranks, options.effort)
                case = Case(f"{name}, {ranks} ranks", path, plan, load, shape, ranks, apart, options.length)
                found = _case(case, options)
                _same_answers(found)
                _keep(out, case.name, _held(found))


class Case(NamedTuple):
    """A model on so many ranks, and what it is asked."""

    name: str
    model: Path
    plan: Path
    load: Path  # pairs of each expert, by layers, as SGLang's EPLB reads them
    shape: moe_models.Shape
    ranks: int
    apart: bool  # whether attention is data-parallel
    length: int  # tokens, whose first answers are timed

    def asked(self, seed: int) -> list[list[int]]:
        """Requests of so many tokens together: one of any ids, or of a topic each."""
        if not self.apart:
            return [_prompt(self.shape, seed, self.length)]
        random, block = np.random.default_rng(seed), moe_models.planted_routing(self.shape)[1]
        topics = random.permutation(moe_models.BLOCKS)
        return [random.choice(np.flatnonzero(block == one), self.length // len(topics)).tolist() for one in topics]

    def first(self, client: Client, seed: int) -> float:
        """Seconds to their first tokens: of several requests, which so make one batch, while another is answered."""
        meanwhile = _prompt(self.shape, seed, 1) if self.apart else None
        return client.batch(self.asked(seed), 1, meanwhile).first


def _case(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    links = options.links.split(",")
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        apart = case.apart or links != ["loopback"]
        names = stack.enter_context(namespaces(case.ranks)) if apart else []
        stock = stack.enter_context(_served("stock", case, names, options.seconds))
        for way in options.ways.split(","):
            section = _WAYS[way]
            chooses = section is not None and section.get("choose", True)
            # What chooses is told of the link when its server starts.
            for group in [[link] for link in links] if chooses else [links]:
                _limit(names, group[0])
                stock.server.pause()
                with _served(way, case, names, options.seconds) as other:
                    found += [one for link in group for one in _by_turns(stock, other, case, names, link, options)]
                print(json.dumps([{**one, "answers": None} for one in found[-2 * len(group) :]]), flush=True)
                stock.server.resume()
    return found


def _keep(out: Path, case: str, held: list[dict[str, Any]]) -> None:
    here = provenance(torch.device("cpu"), (), "python " + " ".join(_command()))
    here["versions"] = versions("sglang", "torch", "transformers")  # of the servers' environment
    file = out / "moe_sglang.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    run = {"command": here["command"], "commit": here["commit"]}
    parts = {**old.get("parts", {}), case: {"run": run, "rows": _rows(case, held), "measured": held}}
    result = {**here, "rows": [row for part in parts.values() for row in part["rows"]], "parts": parts}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    _draw({name: part["measured"] for name, part in parts.items()}, out / "moe_sglang.png")


def _command() -> list[str]:
    return ["examples/benchmarks/moe_sglang.py", *sys.argv[1:]]


def _made(folder: Path, name: str, shape: moe_models.Shape) -> Path:
    """A model with random weights, its routing planted in four hidden blocks or as random as they are."""
    torch.manual_seed(0)
    config = moe_models.config_of(shape)
    config.max_position_embeddings = 2048  # room for prompt and answer
    model = Qwen3MoeForCausalLM(config).eval()
    if name != "random":
        moe_models.plant(model, moe_models.planted_routing(shape)[0])
    model.save_pretrained(folder / name)
    return folder / name


def _planned(model: Path, folder: Path, shape: moe_models.Shape, ranks: int, effort: int) -> tuple[Path, Path]:
    """A plan by other requests than are timed, and the experts' load in them."""
    profiled = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    profile = profile_model(profiled, [torch.tensor(_prompt(shape, 1000 + seed, 256)) for seed in range(16)])
    plan, load = folder / f"plan{ranks}.safetensors", folder / "load.json"
    make_plan(profile, ranks, effort=effort).save(plan)
    counts = [profile.table(place).counts.sum(0).tolist() for place in range(shape.layers)]
    load.write_text(json.dumps({"logical_count": counts}))
    return plan, load


def _prompt(shape: moe_models.Shape, seed: int, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(4, shape.vocabulary, length).tolist()
    return ids


class Served(NamedTuple):
    """A server that is up, and who asks it."""

    way: str
    server: Ranks
    client: Client


@contextlib.contextmanager
def _served(way: str, case: Case, names: Sequence[str], seconds: float) -> Iterator[Served]:
    section = _WAYS[way]
    plan = {"plan": str(case.plan)} if section and section.get("plan") else {}
    config = None if section is None else {"speculative_moe": {**section, **plan}}
    flags = [*_FLAGS, "--ep", str(case.ranks)]
    flags += ["--init-expert-location", str(case.load)] if way == "EPLB" else []
    flags += ["--dp", str(case.ranks), "--enable-dp-attention", *_APART] if case.apart else []
    logs = f"log of {way}"
    server = Ranks(
        case.model, case.model.parent, logs, case.length, ranks=case.ranks, flags=flags, config=config, spaces=names
    )
    try:
        with Client(server, seconds) as client:
            yield Served(way, server, client)
    finally:
        server.close()


def _by_turns(
    stock: Served, other: Served, case: Case, names: Sequence[str], link: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Two entries, stock's and the other one's, on one link: the one that is not asked is paused."""
    _limit(names, link)
    both = (stock, other)
    first: tuple[list[float], ...] = ([], [])
    further: tuple[list[float], ...] = ([], [])
    answers: tuple[list[list[int]], ...] = ([], [])
    wire = [0, 0]
    _settle(other.client, case)
    other.server.pause()
    with _awake(stock):
        _settle(stock.client, case)
    with _awake(other):
        before = other.client.layers()
    for seed in range(options.repeats):
        for at, one in _turn(both, seed):
            with _awake(one):
                port = sent(0) if names else 0
                first[at].append(case.first(one.client, 1 + seed))
                wire[at] += sent(0) - port if names else 0
    with _awake(other):
        after = other.client.layers()
    for seed in range(max(1, options.repeats // 2)):
        prompts = [_prompt(case.shape, 50 + 8 * seed + at, 16) for at in range(8)]
        for at, one in _turn(both, seed):
            with _awake(one):
                answered = one.client.batch(prompts, 1 + options.decode)
            further[at].extend(answered.between)
            answers[at].extend(answered.answers)
    with _awake(other):
        state = other.client.state()
    other.server.resume()
    layers = [_sent(a, b) / options.repeats for a, b in zip(before, after, strict=True)]
    sums = 4 * (case.ranks - 1) / case.ranks * case.shape.hidden * 4 * case.length  # stock's two, over all ranks
    unknown = None if case.apart else sums
    return [
        {
            "way": one.way if at else "stock",
            "beside": other.way,
            "link": link,
            "ranks": case.ranks,
            "tokens": case.length,
            "layers": case.shape.layers,
            "ttft_ms": 1e3 * statistics.median(first[at]),
            "token_ms": 1e3 * statistics.median(further[at]),
            "wire_bytes": wire[at] / options.repeats if names else None,
            "layer_bytes": statistics.mean(layers) if at and before else unknown,
            "spread": _share(before, after) if at else None,
            **{
                name: state.get(name) if at else None
                for name in ("trial", "rates", "expert_times", "ledger", "laid_aside")
            },
            "answers": answers[at],
        }
        for at, one in enumerate(both)
    ]


def _turn(both: Sequence[Served], turn: int) -> list[tuple[int, Served]]:
    """Both with their numbers, each first every other time."""
    return list(enumerate(both))[:: -1 if turn % 2 else 1]


@contextlib.contextmanager
def _awake(one: Served) -> Iterator[None]:
    one.server.resume()
    time.sleep(0.2)
    yield
    one.server.pause()


def _settle(client: Client, case: Case) -> None:
    """Not timed: connections, memory, and the batches by which forerun learns which ways, and whether a plan, it keeps.

    Sizes of batches that come seldom may still go by turns when the timing begins: `trial` of an entry tells.
    """
    for seed in range(45):
        case.first(client, 100 + seed)
        if seed % 4 == 0:  # some forty tokens of prompts to each that is answered
            client.batch([_prompt(case.shape, 200 + 8 * seed + at, 16) for at in range(8)], 8)
        state = client.state()
        known = not any("by turns" in size for size in state.get("trial", []))
        known &= not state.get("ledger") or (state["ledger"]["batches"] >= 64 and not state["moving"])
        if known and seed >= (_SETTLES if state else 1):
            break


def _same_answers(found: list[dict[str, Any]]) -> None:
    """Greedy tokens are compared and taken out: of all that were generated, the share that is stock's."""
    for stock, other in zip(found[::2], found[1::2], strict=True):
        theirs, ours = stock.pop("answers"), other.pop("answers")
        other["same_answers"] = sum(one == its for one, its in zip(ours, theirs, strict=True)) / len(ours)


def _limit(names: Sequence[str], link: str) -> None:
    for rank in range(len(names)):
        limit(rank, None if link == "loopback" else link)


def _sent(before: dict[str, Any], after: dict[str, Any]) -> float:
    return sum(float(after[name] - before[name]) for name in ("bytes", "stock_bytes"))


def _share(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> float | None:
    """Of the batches, those that were spread."""
    spread = sum(b["ours"] - a["ours"] for a, b in zip(before, after, strict=True))
    whole = spread + sum(b["stock"] - a["stock"] for a, b in zip(before, after, strict=True))
    return spread / whole if whole else None


def _held(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way beside stock, and what the wire can give: (compute + wire) / compute, and with its own bytes.

    Of stock's entries those beside the last way stay, as a table's own column.
    """
    computing = min(one["ttft_ms"] for one in found if one["way"] == "stock")
    kept, result = {}, []
    for stock, one in zip(found[::2], found[1::2], strict=True):
        rate = _RATES[one["link"]]
        wires = [8e3 * entry["wire_bytes"] / rate if rate and entry["wire_bytes"] else 0.0 for entry in (stock, one)]
        fewer = [entry["wire_bytes"] or entry["layer_bytes"] for entry in (stock, one)]
        held = {
            **one,
            "stock_ttft_ms": stock["ttft_ms"],
            "stock_token_ms": stock["token_ms"],
            "stock_wire_bytes": stock["wire_bytes"],
            "sooner": stock["ttft_ms"] / one["ttft_ms"],
            "sooner_decode": stock["token_ms"] / one["token_ms"],
            "fewer_bytes": fewer[0] / fewer[1] if all(fewer) else None,
            "bound": (computing + wires[0]) / computing,
            "bound_own": (computing + wires[0]) / (computing + wires[1]),
        }
        result.append(held)
        kept[one["link"]] = stock
    return [*kept.values(), *result]


def _rows(name: str, held: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for one in held:
        if one["way"].startswith("stock"):
            continue
        case, first, further = (
            f"SGLang, {name}, {one['link']}, {one['way']}",
            one["stock_ttft_ms"],
            one["stock_token_ms"],
        )
        rows += [
            comparison(f"{case}: first token", "ms", one["ttft_ms"], first, "stock", first / one["bound"]),
            comparison(f"{case}: a further token of 8", "ms", one["token_ms"], further, "stock", None),
        ]
        if one["wire_bytes"]:
            sizes = one["wire_bytes"] / 1e6, one["stock_wire_bytes"] / 1e6
            rows.append(comparison(f"{case}: a rank sends", "MB", *sizes, "stock", None))
    return rows


def _draw(cases: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Times stock's to the first token, by way, a colour a link; what its own bytes allow at most dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(cases)), layout="constrained")
    for axes, (case, held) in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases.items(), strict=True):
        found = [one for one in held if one["way"] != "stock"]
        links, ways = (list(dict.fromkeys(one[name] for one in found)) for name in ("link", "way"))
        for number, link in enumerate(links):
            mine = [one for one in found if one["link"] == link]
            places = [ways.index(one["way"]) + 0.8 * (number - (len(links) - 1) / 2) / len(links) for one in mine]
            axes.bar(places, [one["sooner"] for one in mine], 0.8 / len(links), label=link, color=f"C{number}")
            for place, one in zip(places, mine, strict=True):
                wide = 0.4 / len(links)
                axes.hlines(one["bound_own"], place - wide, place + wide, colors="black", linestyles="dashed")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(ways)), ways)
        axes.set(ylabel="times stock's speed", title=f"SGLang, {case}, {held[0]['tokens']} tokens to the first one")
        axes.grid(visible=True, axis="y", alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        default="planted,planted-dp,folded,random",
        help="random, planted, folded; with -dp: data-parallel attention",
    )
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--ways", default=",".join([*_WAYS][1:]), help="each beside stock")
    parser.add_argument("--links", default=",".join(_RATES), help="all but loopback alone need root")
    parser.add_argument("--shape", choices=tuple(moe_models.SHAPES), help="of the model; its own if not given")
    parser.add_argument("--length", type=int, default=512, help="tokens whose first answer is timed")
    parser.add_argument("--decode", type=int, default=16, help="further tokens of a request")
    parser.add_argument("--repeats", type=int, default=7, help="of each prompt; half as many of further tokens")
    parser.add_argument("--effort", type=int, default=20, help="descents of a layer's plan")
    parser.add_argument("--seconds", type=float, default=900, help="after which a server's start is given up")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # with its servers
    given = _parsed()
    main(given.out, given)
