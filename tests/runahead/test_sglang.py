"""KV-Runahead in SGLang's own server: two ranks on a CPU, beside the stock server and transformers."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("sglang")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hosts"))

from sglang_models import continued, load, make_model, prompts
from sglang_servers import Server

from forerun.runahead.batch import divide
from forerun.runahead.traffic import all_gather, hops, returned

SHARES = (0.6, 0.4)
CHUNK = 128
ALL_TOKENS = {"ignore_eos": True, "skip_special_tokens": False}
LAYERS, KV_BYTES = 3, 2 * 2 * 32 * 4  # of the models: GQA, 2 heads of 32, fp32
SHARED = {"chunked_prefill_size": CHUNK, "mem_fraction_static": 0.5}  # other processes' memory counts as theirs
CHAIN = {"tp": 2, "attn_cp_size": 2, "enable_prefill_cp": True, "cp_strategy": "zigzag"}
MIXED = [9, 70, 128, 1, 300, 33, 2, 141]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "Qwen3")


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    """Ours and stock, started together."""
    logs = tmp_path_factory.mktemp("logs")
    split = {"runahead": {"split": list(SHARES)}}
    ours = Server(folder, logs / "ours", config=split, **SHARED, **CHAIN)
    stock = Server(folder, logs / "stock", **SHARED)
    try:
        yield ours.ready(600), stock.ready(600)
    finally:
        ours.close()
        stock.close()


@pytest.fixture
def ours(servers):
    servers[0].call("/flush_cache?timeout=60", {})
    return servers[0]


@pytest.fixture
def stock(servers):
    return servers[1]


@pytest.fixture(scope="module")
def reference(folder):
    return load(folder)


def moved(server):
    return server.info()[0]["runahead"]


def grown(before, after):
    return {name: after[name] - before[name] for name in ("sent", "received", "returned", "completed", "passes")}


def expected(*lengths):
    """What the first of two ranks moves in one pass over sequences of so many uncached tokens."""
    totals = [sum(own) for own in zip(*divide(lengths, SHARES), strict=True)]
    back = returned(totals, KV_BYTES * LAYERS)
    assert sum(hops(totals, KV_BYTES * LAYERS) + back) == all_gather(sum(totals), 2, KV_BYTES * LAYERS)
    return {"sent": hops(totals, KV_BYTES * LAYERS)[0], "received": 0, "returned": 0, "completed": back[1], "passes": 1}


def test_the_release_is_told(ours):
    release = metadata.version("sglang")
    assert moved(ours)["sglang"] == release
    assert f"KV-Runahead: rank 0 of 2, sglang {release}, " in ours.told(1 << 20)


def test_eight_at_once_as_stock_and_transformers(ours, stock, reference):
    asked = prompts(MIXED)
    wanted = [continued(reference, prompt, 64) for prompt in asked]
    before = moved(ours)
    assert stock.generate(asked, 64) == wanted
    assert ours.generate(asked, 64) == wanted
    assert grown(before, moved(ours))["passes"] > 2


def test_clients_of_their_own_through_the_openai_api(ours, reference):
    openai = pytest.importorskip("openai")
    asked = prompts(MIXED, seed=1)

    def ask(prompt):
        found = client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=64,
            temperature=0,
            extra_body=ALL_TOKENS,
        )
        return [int(word.removeprefix("t")) for word in found.choices[0].text.split()]

    url = f"http://127.0.0.1:{ours.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=240) as client, ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    assert answers == [continued(reference, prompt, 64) for prompt in asked]


def test_bytes_are_the_formula_s(ours):
    for length in (100, 77, 2):
        before = moved(ours)
        ours.generate(prompts([length], seed=length)[0], 3)
        assert grown(before, moved(ours)) == expected(length)


def test_cached_tokens_are_attended_to_and_not_sent(ours, reference):
    start, rest = prompts([90], seed=5)[0], prompts([31], seed=6)[0]
    ours.generate(start, 1)
    before = moved(ours)
    assert ours.generate(start + rest, 64) == continued(reference, start + rest, 64)
    assert grown(before, moved(ours)) == expected(31)


def test_a_long_prompt_comes_in_chunks(ours, reference):
    prompt = prompts([300], seed=8)[0]
    before = moved(ours)
    assert ours.generate(prompt, 64) == continued(reference, prompt, 64)
    each = [expected(length) for length in (CHUNK, CHUNK, 300 - 2 * CHUNK)]
    assert grown(before, moved(ours)) == {name: sum(one[name] for one in each) for name in each[0]}


def test_one_token_is_not_split(ours, reference):
    before = moved(ours)
    assert ours.generate([11], 64) == continued(reference, [11], 64)
    assert grown(before, moved(ours))["passes"] == 0


def test_log_probabilities_of_the_prompt(ours, stock):
    body = {
        "input_ids": prompts([60], seed=9)[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    told = [json.loads(server.call("/generate", body))["meta_info"] for server in (ours, stock)]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        first, second = ([entry[0] for entry in one[name]][name.startswith("input") :] for one in told)
        assert first == pytest.approx(second, abs=2e-4)
