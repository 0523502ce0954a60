"""Speculative MoE in SGLang's server on 2 ranks: its own expert parallelism, ours part by part and as turned on.

- stock: SGLang's `--tp 2 --ep 2`, two sums over all ranks a layer.
- ours: tokens spread over the ranks, experts in their order.
- s-EG: experts grouped by a plan too.
- s-EG + s-TS: tokens sent where the plan expects their experts too.
- forerun: the same as it is turned on: each layer and batch takes the way that is expected to be sooner on this link.

Ranks are two nodes of one server in network namespaces, joined by links without limit, of 1 Gbit/s and of 100 Mbit/s,
which needs root; `--links loopback` does not. Writes `results/sglang.json` and a picture.

    python examples/benchmarks/moe_sglang.py [--links loopback] [--length 512] [--repeats 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe_models
import numpy as np
import torch
from links import limit, namespaces
from measurement import comparison, provenance
from moe_sglang_server import Client, Server
from transformers import Qwen3MoeForCausalLM

from forerun.moe.planning import make_plan
from forerun.moe.transformers import profile_model

_RESULTS = Path(__file__).parent / "results"
_RATES = {"loopback": None, "1gbit": 1e9, "100mbit": 1e8}  # bits a second, each way of each rank
_RANKS = 2
_WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "ours": {"choose": False},
    "s-EG": {"choose": False, "plan": True, "shuffle": False},
    "s-EG + s-TS": {"choose": False, "plan": True},
    "forerun": {"plan": True},
}


def main(out: Path, options: argparse.Namespace) -> None:
    links = options.links.split(",")
    shape = moe_models.SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        path, plan = _made(Path(folder), shape, options.effort)
        found: list[dict[str, Any]] = []
        for way, section in _WAYS.items():
            config = None if section is None else {**section, **({"plan": str(plan)} if section.get("plan") else {})}
            # What chooses is told of the link when its server starts.
            groups = [[link] for link in links] if config is not None and config.get("choose", True) else [links]
            for group in groups:
                found += _measured(way, config, path, Path(folder), group, shape, options)
                print(json.dumps(found[-len(group) :]), flush=True)
    _same_answers(found)
    here = provenance(torch.device("cpu"), ("numpy", "torch", "transformers"), "python " + " ".join(_command()))
    here["versions"]["sglang"] = options.release
    file = out / "sglang.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    run = {"command": here["command"], "commit": here["commit"]}
    parts = {**old.get("parts", {}), "moe": {"run": run, "rows": _rows(found), "measured": _held(found)}}
    result = {**here, "rows": [row for part in parts.values() for row in part["rows"]], "parts": parts}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    _draw(_held(found), out / "sglang-moe.png")


def _command() -> list[str]:
    return ["examples/benchmarks/moe_sglang.py", *sys.argv[1:]]


def _made(folder: Path, shape: moe_models.Shape, effort: int) -> tuple[Path, Path]:
    """A model whose routing is planted in four hidden blocks, and a plan of it from other requests than are timed."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(moe_models.config_of(shape)).eval()
    chosen, _ = moe_models.planted_routing(shape)
    moe_models.plant(model, chosen)
    path = folder / "planted"
    model.save_pretrained(path)
    profiled = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    pieces = [torch.from_numpy(_prompt(shape, 1000 + seed, 256)) for seed in range(16)]
    plan = folder / "plan.safetensors"
    make_plan(profile_model(profiled, pieces), _RANKS, effort=effort).save(plan)
    return path, plan


def _prompt(shape: moe_models.Shape, seed: int, length: int) -> Any:
    return np.random.default_rng(seed).integers(4, shape.vocabulary, length)


def _measured(
    way: str,
    config: dict[str, Any] | None,
    model: Path,
    folder: Path,
    links: Sequence[str],
    shape: moe_models.Shape,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Every link on one server."""
    apart = set(links) != {"loopback"} or options.apart
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(namespaces(_RANKS)) if apart else []
        _limit(names, links[0])  # so that a server that measures its link measures this one
        server = Server(model, folder / "log", options.python, config, names, options.seconds)
        stack.callback(server.close)
        client = stack.enter_context(Client(server, options.python))
        answers: list[list[int]] = []
        found = []
        for link in links:
            _limit(names, link)
            first, further = [], []
            client.first(_prompt(shape, 0, options.length).tolist())  # not timed: connections, memory
            before = client.layers()
            for seed in range(options.repeats):
                first.append(client.first(_prompt(shape, 1 + seed, options.length).tolist()))
            after = client.layers()
            for seed in range(options.repeats):
                prompts = [_prompt(shape, 50 + 8 * seed + at, 16).tolist() for at in range(8)]
                seconds, tokens = client.batch(prompts, options.decode)
                further.append(seconds / options.decode)
                answers += tokens if link == links[0] else []
            width = shape.hidden * 4
            stock = 4 * (_RANKS - 1) / _RANKS * width * options.length
            sent = [_sent(a, b) / options.repeats for a, b in zip(before, after, strict=True)]
            found.append(
                {
                    "way": way,
                    "link": link,
                    "tokens": options.length,
                    "layers": shape.layers,
                    "ttft_ms": 1e3 * statistics.median(first),
                    "token_ms": 1e3 * statistics.median(further),
                    "bytes": statistics.mean(sent) if before else stock,
                    "stock_bytes": stock,
                    "spread": _share(before, after),
                    "answers": answers if link == links[0] else None,
                }
            )
        return found


def _same_answers(found: list[dict[str, Any]]) -> None:
    """Greedy tokens are compared and taken out: of all that were generated, the share that is stock's."""
    stock = next(one["answers"] for one in found if one["way"] == "stock" and one["answers"])
    for one in found:
        answers = one.pop("answers")
        if answers:
            same = [ours == theirs for ours, theirs in zip(answers, stock, strict=True)]
            one["same_answers"] = sum(same) / len(same)


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
    """Each entry beside stock's, and what the wire can give: (compute + wire) / compute, and with its own bytes."""
    at = {(one["way"], one["link"]): one for one in found}
    result = []
    for one in found:
        stock, rate = at["stock", one["link"]], _RATES[one["link"]]
        computing = min(entry["ttft_ms"] for entry in found if entry["way"] == "stock")
        wires = [0.0 if rate is None else 8e3 * entry["bytes"] * one["layers"] / rate for entry in (stock, one)]
        result.append(
            {
                **one,
                "sooner": stock["ttft_ms"] / one["ttft_ms"],
                "sooner_decode": stock["token_ms"] / one["token_ms"],
                "fewer_bytes": stock["bytes"] / one["bytes"],
                "bound": (computing + wires[0]) / computing,
                "bound_own": (computing + wires[0]) / (computing + wires[1]),
            }
        )
    return result


def _rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    at, rows = {(one["way"], one["link"]): one for one in found}, []
    for one in _held(found):
        if one["way"] == "stock":
            continue
        stock, case = at["stock", one["link"]], f"SGLang, planted, 2 ranks, {one['link']}, {one['way']}"
        least = stock["ttft_ms"] / one["bound"]
        rows += [
            comparison(f"{case}: first token", "ms", one["ttft_ms"], stock["ttft_ms"], "stock", least),
            comparison(f"{case}: a further token of 8", "ms", one["token_ms"], stock["token_ms"], "stock", None),
        ]
        if one["link"] == "loopback":
            sent, whole = one["bytes"] / 1e6, stock["bytes"] / 1e6
            rows.append(comparison(f"{case}: a layer of a rank sends", "MB", sent, whole, "stock", None))
    return rows


def _draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Time to the first token by way, a colour a link; what each link's bound allows stock's way dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    links, ways = (list(dict.fromkeys(one[name] for one in found)) for name in ("link", "way"))
    for number, link in enumerate(links):
        mine = [one for one in found if one["link"] == link]
        places = [ways.index(one["way"]) + 0.8 * (number - (len(links) - 1) / 2) / len(links) for one in mine]
        axes.bar(places, [one["ttft_ms"] for one in mine], 0.8 / len(links), label=link, color=f"C{number}")
        for place, one in zip(places, mine, strict=True):
            least = one["ttft_ms"] * one["sooner"] / one["bound_own"]
            axes.hlines(least, place - 0.4 / len(links), place + 0.4 / len(links), colors="black", linestyles="dashed")
    axes.set_xticks(range(len(ways)), ways)
    axes.set(ylabel="ms to the first token", title=f"SGLang, 2 ranks, {found[0]['tokens']} tokens")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _parsed() -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default=",".join(_RATES), help="all but loopback alone need root")
    parser.add_argument("--apart", action="store_true", help="loopback in namespaces too, for one basis with the links")
    parser.add_argument("--shape", choices=tuple(moe_models.SHAPES), default="folded", help="of the model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--decode", type=int, default=16, help="further tokens of a request")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing")
    parser.add_argument("--effort", type=int, default=20, help="descents of a layer's plan")
    parser.add_argument("--python", type=Path, default=root / ".venv-sglang" / "bin" / "python", help="SGLang's")
    parser.add_argument("--release", default="0.5.23", help="of SGLang there")
    parser.add_argument("--seconds", type=float, default=900, help="after which a server's start is given up")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    given = _parsed()
    main(given.out, given)
