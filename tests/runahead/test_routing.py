"""Chain or one engine, without HTTP: routes, requests read, cached prefixes."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.runahead.asking import CHAT, COMPLETIONS, read_ask
from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.counts import labels_of, merge
from forerun.runahead.prefixes import Prefixes, block_keys, digest, token_bytes
from forerun.runahead.routing import Router, Standing, guess_table
from forerun.runahead.table import make_table

BLOCK = 16
CHAIN = Chain(Cost(0.01, 1e-4, 0, 1e-8), Link(1e9, 1e-4), 4, 1024)
TABLE = make_table(CHAIN, [256, 1024, 4096, 16384], 3, model="m", hardware="h", block=BLOCK)
ROUTER = Router(TABLE, 3, BLOCK)
ROUTER.complete()
STANDINGS = st.builds(Standing, st.just(0), st.integers(0, 20000), st.integers(0, 8), st.integers(0, 1000))


def idle(count, **cached):
    return [Standing(i, cached=cached.get(f"e{i}", 0)) for i in range(count)]


@given(st.lists(STANDINGS, min_size=1, max_size=3), st.integers(1, 20000), st.booleans())
@settings(max_examples=200)
def test_a_route_is_a_split_of_the_prompt_that_is_expected_no_later_than_any_one_engine(standings, tokens, alone):
    standings = [Standing(i, one.prefill, one.decoding, one.cached * BLOCK) for i, one in enumerate(standings)]
    route = ROUTER.route(standings, tokens, alone=alone)
    assert len(set(route.engines)) == len(route.ends) == len(route.engines)
    bounds = [0, *route.ends]
    assert bounds[-1] == tokens and all(a < b for a, b in zip(bounds, route.ends, strict=False))
    assert all(end % BLOCK == 0 for end in route.ends[:-1])
    members = {one.engine: one for one in standings}
    if len(route.engines) > 1:
        assert not alone and tokens >= ROUTER.least
        assert route.cached % BLOCK == 0
        assert all(members[engine].cached >= route.cached for engine in route.engines)
        assert route.ends[0] > route.cached  # all contexts cover tokens that are not cached
    for one in standings:
        sticky = ROUTER.route([one], tokens, alone=True)
        assert route.ttft <= sticky.ttft


def test_idle_engines_share_a_long_prompt_and_a_short_one_stays_whole():
    assert len(ROUTER.route(idle(3), 16000).engines) == 3
    assert ROUTER.route(idle(3), ROUTER.least - 1).engines == (0,)
    assert len(ROUTER.route(idle(3), ROUTER.least + 4 * BLOCK).engines) > 1
    assert ROUTER.route(idle(1), 16000).ends == (16000,)
    assert len(ROUTER.route(idle(2), 16000).engines) == 2  # one of three is down


def test_a_conversation_stays_with_its_prefix():
    route = ROUTER.route(idle(3, e1=15872), 16000)
    assert route.engines == (1,) and route.cached == 15872
    shared = ROUTER.route(idle(3, e0=8000, e1=8000, e2=8000), 16000)
    assert len(shared.engines) == 3 and shared.cached == 8000


def test_the_engine_that_has_least_to_do_answers():
    standings = [Standing(0, decoding=5), Standing(1, decoding=1), Standing(2, decoding=9)]
    assert ROUTER.route(standings, 16000).engines[-1] == 1
    assert ROUTER.route(standings, 100).engines == (1,)
    busy = [Standing(0, prefill=100000), Standing(1), Standing(2)]
    assert set(ROUTER.route(busy, 16000).engines) == {1, 2}


def test_without_measurements_the_split_follows_from_the_models_arithmetic():
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512, "intermediate_size": 2048}
    first, last = guess_table(config, 2, BLOCK, "m").split(8192).contexts
    assert first > last  # causal attention: later tokens cost more
    first, last = guess_table(None, 2, BLOCK, "m").split(8192).contexts
    assert first == pytest.approx(last, rel=0.05)


def test_a_table_is_kept_to_the_engines_blocks():
    assert all(end % 48 == 0 for end in Router(TABLE, 2, 48).route(idle(2), 16000).ends[:-1])
    with pytest.raises(ValueError, match="least prompt of a chain is 0"):
        Router(TABLE, 2, BLOCK, 0)
    with pytest.raises(ValueError, match="0 engines are up"):
        ROUTER.route([], 10)


@pytest.mark.parametrize(
    ("body", "alone"),
    [
        ({"prompt": "a"}, None),
        ({"prompt": ["a"]}, None),
        ({"prompt": [1, 2]}, None),
        ({"prompt": [[1, 2]], "n": 1, "logprobs": 3, "stream": True}, None),
        ({"prompt": ["a", "b"]}, "batch"),
        ({"prompt": [[1], [2]]}, "batch"),
        ({"prompt": [1, -2]}, "batch"),
        ({"prompt": ""}, None),
        ({}, "body"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "best_of": 2}, "n"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "kv_transfer_params": {"runahead": {}}}, "kv_transfer_params"),
    ],
)
def test_completions_that_one_engine_has_to_answer(body, alone):
    assert read_ask(COMPLETIONS, json.dumps(body).encode()).alone == alone


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"a"', b"\xff"])
def test_what_is_no_request_is_left_to_an_engine(raw):
    assert read_ask(COMPLETIONS, raw).alone == "body"


@pytest.mark.parametrize(
    ("content", "alone"),
    [
        ("hello", None),
        (None, None),
        ([{"type": "text", "text": "hello"}], None),
        ([{"type": "image_url", "image_url": {"url": "http://x"}}], "multimodal"),
        ({"no": "content"}, "multimodal"),
    ],
)
def test_chats_that_one_engine_has_to_answer(content, alone):
    body = {"messages": [{"role": "user", "content": content}]}
    assert read_ask(CHAT, json.dumps(body).encode()).alone == alone


def test_a_chat_is_tokenized_as_the_chat_endpoint_would():
    body = {"model": "m", "messages": [{"role": "user", "content": "h"}], "reasoning_effort": "low", "temperature": 1}
    ask = read_ask(CHAT, json.dumps({**body, "chat_template_kwargs": {"x": 1}, "tools": []}).encode())
    assert ask.tokenize == {
        "model": "m",
        "messages": body["messages"],
        "tools": [],
        "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": True, "x": 1},
    }


@given(st.text(max_size=200))
def test_tokens_never_outnumber_bytes(text):
    ask = read_ask(COMPLETIONS, json.dumps({"prompt": text}).encode())
    assert ask.longest >= len(text.encode(errors="replace"))


TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS, TOKENS)
def test_keys_are_equal_exactly_as_far_as_blocks_are(first, second):
    keys = [block_keys(token_bytes(tokens), 8 * 4, "root") for tokens in (first, second)]
    same = next((i for i, (a, b) in enumerate(zip(*keys, strict=False)) if a != b), min(map(len, keys)))
    whole = min(len(first), len(second)) // 4
    assert same == next((i for i in range(whole) if first[: 4 * i + 4] != second[: 4 * i + 4]), whole)
    assert not set(keys[0]) & set(block_keys(token_bytes(first), 8 * 4, "another"))
    assert (digest(first) == digest(second)) == (first == second)


@given(st.lists(TOKENS, max_size=20), st.integers(0, 12))
def test_an_index_is_bounded_and_keeps_what_was_used_last(prompts, capacity):
    prefixes, oracle = Prefixes(capacity), OrderedDict()
    for tokens in prompts:
        keys = block_keys(token_bytes(tokens), 8 * 4, "")
        prefixes.add(keys)
        for key in reversed(keys[:capacity]):
            oracle.pop(key, None)
            oracle[key] = None
        while len(oracle) > capacity:
            oracle.popitem(last=False)
        assert len(prefixes) <= capacity
        assert prefixes.match(keys) == min(len(keys), capacity)
    for tokens in prompts:
        keys = block_keys(token_bytes(tokens), 8 * 4, "")
        assert prefixes.match(keys) == next((i for i, key in enumerate(keys) if key not in oracle), len(keys))
    prefixes.clear()
    assert len(prefixes) == 0


def test_metrics_are_one_text_with_an_engine_to_each_sample():
    text = '# HELP a_total told\n# TYPE a_total counter\na_total{x="1,}"} 2.0\n# HELP b told\n# TYPE b gauge\nb 3.0\n'
    from prometheus_client.parser import text_string_to_metric_families

    merged = merge({"0": text, "1": text}, "engine_of")
    assert merged.count("# TYPE a_total counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert {sample.labels["engine_of"] for sample in families["b"].samples} == {"0", "1"}
    assert sum(sample.value for sample in families["a"].samples if sample.name == "a_total") == 4
    assert labels_of(merged, "a_total") == {"engine_of": "0", "x": "1,}"}
    assert labels_of(merged, "c") == {}
