"""KV-Runahead in SGLang's server, at length: families of models, three ranks, a killed rank, refused starts."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

pytest.importorskip("sglang")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hosts"))

from sglang_models import continued, load, make_model, prompts
from sglang_servers import Server

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.table import make_table

MIXED = [9, 70, 128, 1, 300, 33, 2, 141]
LAYERS, KV_BYTES = 3, 2 * 2 * 32 * 4  # of the models: GQA, 2 heads of 32, fp32
SEARCHED = {"flops": 1e8}  # so slow that every prompt gains
LEARNED = {
    "MQA": ("Qwen3", {"num_key_value_heads": 1}, {"split": [0.55, 0.45]}),
    "MHA": ("Qwen3", {"num_key_value_heads": 4}, SEARCHED),
    "tied embeddings": ("Qwen3", {"tie_word_embeddings": True}, {"split": [0.3, 0.7]}),
    "Llama": ("Llama", {}, {"split": [0.7, 0.3]}),
    "Qwen3Moe": ("Qwen3Moe", {}, SEARCHED),
}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def chain(ranks):
    flags = {"tp": ranks, "attn_cp_size": ranks, "enable_prefill_cp": True, "cp_strategy": "zigzag"}
    return {**flags, "mem_fraction_static": 0.5}  # other processes' memory counts as if it were the server's


@pytest.fixture
def start(tmp_path):
    """Starts servers; all are ended."""
    servers = []

    def started(folder, section, ranks=2, **flags):
        config = None if section is None else {"runahead": section}
        servers.append(Server(folder, tmp_path / f"log{len(servers)}", config=config, **{**chain(ranks), **flags}))
        return servers[-1]

    yield started
    for server in servers:
        server.close()


def assert_exact(server, folder):
    reference, asked = load(folder), prompts(MIXED, seed=3)
    wanted = [continued(reference, prompt, 64) for prompt in asked]
    assert server.generate(asked, 64) == wanted
    longer = [prompt + prompts([41], seed=4)[0] for prompt in asked]
    assert server.generate(longer, 64) == [continued(reference, prompt, 64) for prompt in longer]
    moved = server.info()[0]["runahead"]
    assert moved["passes"] >= 2 and moved["sent"] > 0 and moved["completed"] > 0


@pytest.mark.parametrize("kind", LEARNED)
def test_a_family_s_tokens_are_exact(kind, tmp_path, start):
    family, changes, section = LEARNED[kind]
    folder = make_model(tmp_path / "model", family, **changes)
    assert_exact(start(folder, section, chunked_prefill_size=128).ready(600), folder)


@pytest.mark.parametrize("family", ["Qwen2Moe", "Mixtral"])
def test_a_family_that_sglang_cannot_split_is_refused(family, tmp_path, start):
    """Stock's zigzag ends the server at the first prompt; with ours it does not start."""
    folder = make_model(tmp_path / "model", family)
    server = start(folder, {"split": [0.5, 0.5]})
    assert server.ended(600) != 0
    assert "the model lacks get_input_embeddings" in server.told(200_000)
    stock = start(folder, None, environment={"SGLANG_ENABLE_CP_V2": "1"}).ready(600)  # the default from 0.5.20 on
    with pytest.raises((HTTPException, OSError, ValueError, KeyError)):
        stock.generate(prompts([300])[0], 2)
    assert "has no attribute 'get_input_embeddings'" in stock.told(200_000)


def test_three_ranks(tmp_path, start):
    folder = make_model(tmp_path / "model", "Qwen3")
    assert_exact(start(folder, {"split": [0.5, 0.3, 0.2]}, ranks=3).ready(600), folder)


@pytest.fixture
def table(tmp_path):
    """Of two engines so slow that a prompt of 100 tokens gains, and where later tokens cost more; its file."""
    found = make_table(Chain(Cost(0, 1e-2, 0, 1e-4), Link(1e9), 3, 512), [100, 300], 2, model="tiny", hardware="none")
    found.save(tmp_path / "table.json")
    return found, str(tmp_path / "table.json")


def test_a_table_says_the_split(table, tmp_path, start):
    found, path = table
    folder = make_model(tmp_path / "model", "Qwen3")
    server = start(folder, {"table": path}).ready(600)
    (prompt,) = prompts([300])
    first, second = found.split(300).contexts
    assert first != second
    assert server.generate(prompt, 64) == continued(load(folder), prompt, 64)
    moved = server.info()[0]["runahead"]
    assert (moved["sent"], moved["completed"]) == (first * LAYERS * KV_BYTES, second * LAYERS * KV_BYTES)


def test_a_table_for_other_ranks_is_refused(table, tmp_path, start):
    server = start(make_model(tmp_path / "model", "Qwen3"), {"table": table[1]}, ranks=3)
    assert server.ended(600) != 0
    assert "the split is for 2 ranks; the server runs with --attn-cp-size 3" in server.told(200_000)


def test_a_killed_rank_ends_the_server(tmp_path, start):
    folder = make_model(tmp_path / "model", "Qwen3")
    server = start(folder, {"split": [0.6, 0.4]}).ready(600)
    reference, prompt = load(folder), prompts([300])[0]
    (last,) = [pid for pid in server.members() if "scheduler" in (name := title(pid)) and "TP1" in name]
    whole = 0
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.generate, prompt[i:], 200, 120) for i in range(4)]
        end = time.monotonic() + 60
        while not server.info()[0]["runahead"]["passes"]:  # a prompt was split: its answer has just begun
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(last, signal.SIGKILL)
        for i, one in enumerate(asked):
            try:
                found = one.result(180)
            except TimeoutError:
                raise  # nobody is left waiting
            except (HTTPException, OSError, ValueError, KeyError):
                continue  # it was not answered
            assert found == continued(reference, prompt[i:], 200)[: len(found)]
            whole += len(found) == 200
    assert whole < len(asked)  # the kill met requests
    server.ended(180)
    end = time.monotonic() + 60
    while server.members():
        assert time.monotonic() < end, f"left behind: {[title(pid) for pid in server.members()]}"
        time.sleep(0.5)


@pytest.mark.parametrize(
    "section, flags, says",
    [
        ({}, {"enable_prefill_cp": None, "cp_strategy": None, "attn_cp_size": None}, "--enable-prefill-cp"),
        ({"split": [0.5, 0.3, 0.2]}, {}, "the split is for 3 ranks"),
        ({"split": "half"}, {}, "split is 'half'"),
        ({"table": "no-such-table.json"}, {}, "no-such-table.json"),
        ({}, {"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype is not served"),
    ],
)
def test_a_start_that_is_refused(section, flags, says, tmp_path, start):
    server = start(make_model(tmp_path / "model", "Qwen3"), section, **flags)
    assert server.ended(600) != 0
    assert says in server.told(200_000)


def title(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
