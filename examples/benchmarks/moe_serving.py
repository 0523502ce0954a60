"""Serving over real links: bytes, milliseconds a layer, first token, further tokens, for each way of `moe_ways.py`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from links import INTERFACE, namespaces
from measurement import comparison

__all__ = ["LINKS", "draw", "held", "measured", "merged", "rows"]

LINKS = {"loopback": None, "1gbit": 1e9, "100mbit": 1e8}  # bits a second, each way of each rank
_HERE = Path(__file__).parent
_NAMES = {
    "autoep": "stock AutoEP",
    "classic": "stock classic MoE",
    "exact": "forerun, exact",
    "dispatcher": "forerun's dispatcher alone",
    "by load": "experts by load alone",
    "s-EG": "experts grouped (s-EG)",
    "s-TS": "tokens assigned (s-TS)",
    "both": "s-EG and s-TS",
    "as turned on": "both, as turned on",
}


def measured(
    settings: dict[str, Any], ranks: Sequence[int], links: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """Every rank count over loopback, and over the slower links in namespaces.

    Args:
        settings: Of `moe_ranks.py`, but for ranks, rates and files.
        ranks: Numbers of ranks.
        links: Of `LINKS`.
        seconds: After which a run is given up.

    Raises:
        RuntimeError: A rank failed; the message ends with what it printed.
    """
    found: list[dict[str, Any]] = []
    for count in ranks:
        for rates in (["loopback"], [link for link in links if link != "loopback"]):
            if set(rates) <= set(links) and rates:
                with contextlib.nullcontext([]) if rates == ["loopback"] else namespaces(count) as names:
                    found += _run(
                        settings, count, [None if rate == "loopback" else rate for rate in rates], names, seconds
                    )
    return found


def _run(settings: dict[str, Any], ranks: int, rates: list[str | None], names: list[str], seconds: float) -> list[Any]:
    root = _HERE.parents[1]
    folders = (root / "plugins", root / "adapters", root / "examples", _HERE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": INTERFACE if names else "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "out.json", Path(folder) / "settings.json"
        file.write_text(
            json.dumps({**settings, "ranks": ranks, "rates": rates, "store": f"{folder}/store", "out": str(out)})
        )
        logs = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            inside = ["ip", "netns", "exec", names[rank]] if names else []
            command = [*inside, sys.executable, "-u", str(_HERE / "moe_ranks.py"), str(file), str(rank)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            raise RuntimeError(f"rank {failed} of {ranks} failed:\n{logs[failed].read_text()[-3000:]}")
        results: list[Any] = json.loads(out.read_text())
        return results


def held(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each entry beside stock AutoEP's: how many fewer bytes and how much sooner, and what the wire can give at most.

    `bound`: (computing + stock's bytes on the wire) / computing, computing being stock's time over loopback;
    `bound_own`: the same over (computing + its own bytes on the wire).
    """
    at = {(one["model"], one["ranks"], one["link"], one["way"]): one for one in found}
    result = []
    for one in found:
        stock = at[one["model"], one["ranks"], one["link"], "autoep"]
        free = at.get((one["model"], one["ranks"], "loopback", "autoep"))
        rate = LINKS[one["link"]]
        wire = [0.0 if rate is None else 8e3 * entry["busiest_bytes"] / rate for entry in (stock, one)]
        computing = stock["layer"] if free is None else free["layer"]
        entry = {
            **one,
            "fewer_bytes": stock["row_bytes"] / one["row_bytes"] if one["row_bytes"] else None,
            "sooner": stock["layer"] / one["layer"],
            "sooner_decode": stock["tpot"] / one["tpot"],
            "bound": (computing + wire[0]) / computing,
            "bound_own": (computing + wire[0]) / (computing + wire[1]),
        }
        gain = entry["bound_own"] - 1
        entry["of_bound"] = (entry["sooner"] - 1) / gain if rate is not None and gain > 0.02 else None
        result.append(entry)
    return result


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], run: dict[str, str]) -> list[dict[str, Any]]:
    """Each case (model, ranks, link) as it was run last, and by which run, in the order of their first runs."""

    def cases(found: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
        by_case: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for one in found:
            by_case.setdefault((one["model"], one["ranks"], one["link"]), []).append(one)
        return by_case

    return [one for case in {**cases(old), **cases([{**one, "run": run} for one in new])}.values() for one in case]


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against stock AutoEP and stock classic: milliseconds a layer, of a further token, and bytes."""
    result = []
    at = {(one["model"], one["ranks"], one["link"], one["way"]): one for one in found}
    for one in found:
        if one["way"] in ("autoep", "classic"):
            continue
        for peer in ("autoep", "classic"):
            other = at.get((one["model"], one["ranks"], one["link"], peer))
            if other is None:
                continue
            case = f"{one['model']}, {one['ranks']} ranks"
            name = f"{case}, {one['link']}, {_NAMES[one['way']]}: prefill, a layer"
            result.append(
                comparison(name, "ms", one["layer"], other["layer"], _NAMES[peer], other["layer"] / one["bound"])
            )
            name = f"{case}, {one['link']}, {_NAMES[one['way']]}: a further token"
            result.append(comparison(name, "ms", one["tpot"], other["tpot"], _NAMES[peer], None))
            if one["link"] == "loopback":
                name = f"{case}, {_NAMES[one['way']]}: hidden states a layer sends"
                ours, theirs = one["row_bytes"] / 1e6, other["row_bytes"] / 1e6
                result.append(comparison(name, "MB", ours, theirs, _NAMES[peer], one["row_bytes_formula"] / 1e6))
    return result


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a layer by way, a panel a model and rank count, a colour a link; stock AutoEP's bound dashed."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((one["model"], one["ranks"]) for one in found))
    links = list(dict.fromkeys(one["link"] for one in found))
    figure = Figure(figsize=(4.6 * ((len(cases) + 1) // 2), 7.5), layout="constrained")
    panels = figure.subplots(2, (len(cases) + 1) // 2, squeeze=False).ravel()
    for axes, (model, ranks) in zip(panels, cases, strict=False):
        mine = [one for one in found if (one["model"], one["ranks"]) == (model, ranks)]
        ways = list(dict.fromkeys(one["way"] for one in mine))
        for number, link in enumerate(links):
            times = {one["way"]: one["layer"] for one in mine if one["link"] == link}
            places = [at + 0.8 * (number - (len(links) - 1) / 2) / len(links) for at in range(len(ways))]
            axes.bar(places, [times.get(way, 0) for way in ways], 0.8 / len(links), label=link)
        axes.set_xticks(range(len(ways)), [_NAMES[way] for way in ways], rotation=35, ha="right", fontsize=7)
        axes.set(title=f"{model}, {ranks} ranks", ylabel="ms a MoE layer, prefill", yscale="log")
        axes.grid(visible=True, axis="y", alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
