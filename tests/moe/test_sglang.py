"""Speculative MoE in SGLang's own server: the same tokens as transformers, counted bytes as the formula has them."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from importlib import metadata
from urllib.error import HTTPError

import pytest
import torch
from packaging.version import Version

pytest.importorskip("sglang")

from sglang_models import continued, load, make_model, prompts
from sglang_plans import plan_of, routing, sent
from sglang_servers import GREEDY, SHIMS, Server

from forerun.moe.choice import Rates
from forerun.moe.imbalance import ExpertTimes
from forerun.moe.requests import Arrivals
from forerun.moe.sglang_location import location
from forerun.moe.sglang_profile import profile_dumps
from forerun.moe.transformers import profile_model

pytestmark = pytest.mark.timeout(900)  # a server's start is slow beside other work
MIXED = (40, 7, 23, 64, 5, 31, 12, 50)
RELEASE = Version(metadata.version("sglang"))
SINCE = {  # the release, and what a server says before it
    "Mixtral": ("0.5.22", "MixtralDecoderLayer does not hand its tokens over in the way of SGLang's other models"),
    "Qwen2Moe": ("0.5.23", "shared experts of Qwen2MoeSparseMoeBlock before sglang 0.5.23"),
    "DeepseekV2": ("0.5.23", "shared experts of DeepseekV2MoE before sglang 0.5.23"),
}
OLDEST = Version("0.5.19") > RELEASE  # on a CPU it has neither data-parallel attention nor a right placement of its own
DATA_PARALLEL = pytest.mark.skipif(
    OLDEST, reason="stock fails, as test_the_oldest_has_no_data_parallel_attention_on_a_cpu shows"
)
ALWAYS = {"speculative_moe": {"choose": False}}


class Case:
    """A family's model, a plan of it, and its server."""

    def __init__(self, folder, family, *, ranks=2, placed=True, uneven=False, config=ALWAYS, **flags):
        self.path = make_model(folder / "model", family)
        self.model = load(self.path)
        self.plan = plan_of(self.model, prompts([48] * 12, seed=9), ranks, uneven=uneven) if placed else None
        section = dict((config or {}).get("speculative_moe", {}))
        if placed:
            self.plan.save(folder / "plan.safetensors")
            section["plan"] = str(folder / "plan.safetensors")
        told = None if config is None else {"speculative_moe": section}
        self.server = Server(self.path, folder / "log", config=told, tp=ranks, ep=ranks, **flags)

    def expected(self, asked, tokens):
        return [continued(self.model, prompt, tokens) for prompt in asked]

    def layers(self, at=0):
        return self.server.info()[at]["speculative_moe"]["layers"]


def is_refused(folder, family, **server):
    """Whether this release is one on which the model is refused: then a server of it ends, saying why."""
    release, reason = SINCE.get(family, ("0", ""))
    if Version(release) <= RELEASE:
        return False
    case = Case(folder, family, placed=False, **server)
    try:
        assert case.server.ended(400) != 0
        assert reason in case.server.told(1 << 20)
    finally:
        case.server.close()
    assert case.server.members() == []
    return True


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = Case(tmp_path_factory.mktemp("qwen3"), "Qwen3Moe", chunked_prefill_size=96)
    try:
        case.server.ready()
        yield case
    finally:
        case.server.close()
    assert case.server.members() == []


def at_once(server, asked, tokens):
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda prompt: server.generate(prompt, tokens), asked))


def test_mixed_requests_get_the_same_tokens(case):
    asked = prompts(MIXED)
    assert at_once(case.server, asked, 64) == case.expected(asked, 64)
    for layer in case.layers():
        assert layer["ours"] > 64
        assert layer["stock"] == 0


def test_a_prompt_of_several_chunks_and_one_that_is_known(case):
    (long,) = prompts([250], seed=1)
    expected = case.expected([long], 16)[0]
    assert case.server.generate(long, 16) == expected  # in chunks of 96
    assert case.server.generate(long, 16) == expected  # from the radix cache
    other = [*long[:100], 5, 6, 7]
    assert case.server.generate(other, 16) == case.expected([other], 16)[0]


def test_bytes_are_those_of_the_formula(case):
    before = case.layers()
    (prompt,) = prompts([61], seed=2)
    case.server.generate(prompt, 1)
    after = case.layers()
    names = ("rows", "bytes", "pairs", "local")
    counted = [tuple(b[name] - a[name] for name in names) for a, b in zip(before, after, strict=True)]
    assert [b["tokens"] - a["tokens"] for a, b in zip(before, after, strict=True)] == [61] * 3
    assert counted == sent(case.model, case.plan, prompt, 0, notes=1)


def test_a_client_of_the_openai_interface(case):
    import openai

    (prompt,) = prompts([20], seed=3)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{case.server.port}/v1", api_key="none", timeout=120) as client:
        answer = client.completions.create(
            model="default", prompt=prompt, max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
        )
    assert answer.choices[0].text.split() == [f"t{token}" for token in case.expected([prompt], 32)[0]]


def test_what_is_asked_for_is_told(case):
    (state,) = case.server.info()
    told = state["speculative_moe"]
    assert (told["ranks"], told["exact"], told["choose"]) == (2, False, False)
    assert told["model"] == str(case.plan.identity)
    assert told["sglang"] == metadata.version("sglang")


def test_a_shared_expert_is_whole_on_every_rank_or_refused(tmp_path):
    if is_refused(tmp_path, "Qwen2Moe"):
        return
    case = Case(tmp_path, "Qwen2Moe")
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        expected = case.expected(asked, 64)
        assert at_once(case.server, asked, 64) == expected
        for layer in case.layers():
            assert layer["ours"] > 64
            assert layer["stock"] == 0
        (state,) = case.server.info()
        assert state["speculative_moe"]["shared_bytes"] == 3 * (3 * 128 * 128) * 4  # layers, matrices, float32
        with pytest.raises(HTTPError) as refused:  # the slices would change without the whole
            case.server.call("/update_weights_from_disk", {"model_path": case.path})
        assert "forerun holds shared experts whole" in refused.value.read().decode()
        assert at_once(case.server, asked, 64) == expected
    finally:
        case.server.close()
    assert case.server.members() == []


def test_mixtral_is_served_or_refused(tmp_path):
    if is_refused(tmp_path, "Mixtral"):
        return
    case = Case(tmp_path, "Mixtral")
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        assert at_once(case.server, asked, 64) == case.expected(asked, 64)
        assert all(layer["ours"] > 64 and layer["stock"] == 0 for layer in case.layers())
    finally:
        case.server.close()
    assert case.server.members() == []


def test_a_plan_that_no_batch_would_be_sooner_by_is_laid_aside(tmp_path):
    """Whether one would be is told by what was timed at the start; tokens are the same, batches overlapped."""
    case = Case(tmp_path, "Qwen3Moe", config={"speculative_moe": {}}, disable_overlap_schedule=None)
    try:
        case.server.ready(400)
        whole = case.server.call("/server_info")
        state, most = case.server.info()[0]["speculative_moe"], json.loads(whole)["chunked_prefill_size"]
        assert most > 0
        rates = Rates(**{name: tuple(spent) for name, spent in state["rates"].items()})
        # What this plan promises: every expert of a token at hand.
        assert state["laid_aside"] == (not rates.gains(most, 0))
        assert (state["model"] is None) == state["laid_aside"]
        assert (state["moved_bytes"] > 0) == state["laid_aside"]
        asked = prompts(MIXED)
        assert at_once(case.server, asked, 32) == case.expected(asked, 32)
    finally:
        case.server.close()
    assert case.server.members() == []


def test_a_plan_that_costs_more_than_it_saves_is_laid_aside_while_requests_are_served(tmp_path):
    """What it costs is counted, of every token once: the same as by transformers' routing."""
    large = {"FORERUN_CPU_SLOW_SUMS": "large"}  # a prefill of a hundred tokens would gain, decoding never
    case = Case(tmp_path, "Qwen3Moe", uneven=True, config={"speculative_moe": {}}, environment=large)
    try:
        case.server.ready(400)
        asked = prompts([40, 33], seed=3)
        for prompt in asked:
            (before,) = case.server.info()
            assert case.server.generate(prompt, 1) == case.expected([prompt], 1)[0]
            (after,) = case.server.info()
            cost = after["speculative_moe"]["ledger"]["cost"] - before["speculative_moe"]["ledger"]["cost"]
            assert cost == pytest.approx(imbalance(case, prompt, before["speculative_moe"]["expert_times"]))
        assert not after["speculative_moe"]["laid_aside"]
        assert at_once(case.server, asked, 96) == case.expected(asked, 96)
        (state,) = case.server.info()
        told, ledger = state["speculative_moe"], state["speculative_moe"]["ledger"]
        assert ledger["batches"] >= 64
        assert ledger["saved"] == 0
        assert told["laid_aside"] == (told["moved_bytes"] > 0) == (ledger["cost"] > 0)
        assert at_once(case.server, asked, 32) == case.expected(asked, 32)
    finally:
        case.server.close()
    assert case.server.members() == []


def imbalance(case, prompt, times):
    """Seconds that a batch of this prompt takes longer by the plan than with experts in order, as it is expected."""
    experts = case.plan.identity.experts
    chosen = torch.from_numpy(routing(case.model, prompt)).flatten(1)
    pairs = torch.stack([torch.bincount(layer, minlength=experts) for layer in chosen])
    place, in_order = torch.from_numpy(case.plan.order).argsort(1), torch.arange(experts).expand_as(pairs)
    known = ExpertTimes(**times)
    planned, without = (known.seconds(pairs, there, 2).sum() for there in (place, in_order))
    return float(planned - without)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("family", "ranks", "placed", "section", "flags"),
    [
        ("Mixtral", 2, False, {"choose": False, "exact": True}, {}),
        ("Qwen3Moe", 2, True, {"choose": False, "exact": True}, {"disable_radix_cache": True}),
        ("Qwen3Moe", 2, True, {}, {}),
        ("Qwen3Moe", 2, True, {}, {"environment": {"FORERUN_CPU_SLOW_SUMS": "1"}}),
        ("Qwen3Moe", 2, True, {"choose": False}, {"disable_overlap_schedule": None}),
        ("Qwen3Moe", 4, True, {"choose": False}, {}),
        ("Qwen3Moe", 4, True, {"choose": False, "exact": True}, {}),
        ("Qwen3Moe", 4, True, {"choose": False}, {"dp": 4, "enable_dp_attention": True}),
        ("Qwen3Moe", 2, True, {"choose": False, "shuffle": False}, {}),
        ("Qwen3Moe", 2, True, {"choose": False}, {"dp": 2, "enable_dp_attention": True}),
        ("Qwen3Moe", 2, True, {"choose": False, "exact": True}, {"dp": 2, "enable_dp_attention": True}),
        ("Qwen2Moe", 2, True, {"choose": False, "exact": True}, {}),
        ("Qwen2Moe", 2, True, {"choose": False}, {"dp": 2, "enable_dp_attention": True}),
        ("Qwen2Moe", 2, True, {}, {"environment": {"FORERUN_CPU_SLOW_SUMS": "1"}}),
        ("DeepseekV2", 2, True, {"choose": False}, {}),
        ("DeepseekV2", 2, True, {"choose": False, "exact": True}, {}),
        # A dense layer that is tensor-parallel under data-parallel attention sums by NCCL alone.
        ("DeepseekV2", 2, True, {"choose": False}, {"dp": 2, "enable_dp_attention": True, "moe_dense_tp_size": 1}),
    ],
)
def test_other_models_ranks_and_modes(family, ranks, placed, section, flags, tmp_path):
    if is_refused(tmp_path, family, ranks=ranks, config={"speculative_moe": section}):
        return
    if "dp" in flags and OLDEST:
        pytest.skip("stock fails, as test_the_oldest_has_no_data_parallel_attention_on_a_cpu shows")
    case = Case(tmp_path, family, ranks=ranks, placed=placed, config={"speculative_moe": section}, **flags)
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        assert at_once(case.server, asked, 64) == case.expected(asked, 64)
        chooses = section.get("choose", True)
        for layer in case.layers():
            assert (layer["ours"] > 0 and layer["stock"] == 0) or chooses
        if chooses:
            assert_tried_where_a_gain_is_expected(case, for_certain="environment" in flags)
    finally:
        case.server.close()
    assert case.server.members() == []


@pytest.mark.soak
@pytest.mark.skipif(not OLDEST, reason="later releases have it")
def test_the_oldest_has_no_data_parallel_attention_on_a_cpu(tmp_path):
    case = Case(tmp_path, "Qwen3Moe", placed=False, config=None, dp=2, enable_dp_attention=True)
    try:
        with pytest.raises(AssertionError, match=r"the server ended|no answer in 120 s"):
            case.server.ready(120)  # it starts, and does not outlive its first batch
        case.server.says("pin_memory=True requires a CUDA or other accelerator backend")
    finally:
        case.server.close()
    assert case.server.members() == []


def assert_tried_where_a_gain_is_expected(case, *, for_certain):
    """Two batches of a size that was not there before: the first is spread if a gain is expected, the second is not.

    Args:
        for_certain: Whether every layer expects one.
    """
    while case.server.info()[0]["speculative_moe"]["moving"]:  # a plan may have been laid aside: it goes on by batches
        case.server.generate([3, 4], 1)
    for first in (True, False):
        (state,) = case.server.info()
        told = state["speculative_moe"]
        (prompt,) = prompts([400], seed=5 + first)
        assert case.server.generate(prompt, 1) == case.expected([prompt], 1)[0]
        for before, after in zip(told["layers"], case.layers(), strict=True):
            expects = Rates(**told["rates"]).gains(400, 400 * told["expected_rows"][str(before["layer"])])
            assert expects or not for_certain
            ways = (after["ours"] - before["ours"], after["stock"] - before["stock"])
            assert ways == ((1, 0) if first and expects else (0, 1))


@pytest.mark.soak
@DATA_PARALLEL
def test_requests_go_where_their_experts_are_expected(tmp_path):
    """By the plan that is followed: the first one, and another one in its place."""
    config = {"speculative_moe": {"choose": False, "watch": 1}}
    case = Case(tmp_path, "Qwen3Moe", config=config, dp=2, enable_dp_attention=True)
    try:
        case.server.ready(400)
        asked = prompts([2, 3, 4] * 8, seed=4)  # so few tokens that they prefer one rank or the other
        first = homes(case.plan, asked)
        assert len(set(first)) == 2
        assert answered_by(case.server, asked) == first
        share, prior = case.plan.share[..., ::-1], case.plan.prior[:, ::-1]
        other = replace(case.plan, rank=1 - case.plan.rank, share=share, prior=prior)  # turned round
        other.save(tmp_path / "plan.safetensors")
        case.server.generate([5], 2)
        assert answered_by(case.server, asked) == homes(other, asked) != first
        answered = asked_for(case.server, asked[:8], 32)  # together: they wait for each other, whatever came before
        assert sorted(one["meta_info"]["dp_rank"] for one in answered) == [0] * 4 + [1] * 4
    finally:
        case.server.close()


@pytest.mark.soak
@DATA_PARALLEL
def test_requests_are_balanced_by_sglang_once_the_plan_is_laid_aside(tmp_path):
    """It is as soon as it has cost more than it saves; which rank is nearest does not matter from then on."""
    large = {"FORERUN_CPU_SLOW_SUMS": "large"}
    # What SGLang takes otherwise is for NCCL alone.
    flags = {"dp": 2, "enable_dp_attention": True, "boundary_reduction": "rs"}
    case = Case(tmp_path, "Qwen3Moe", uneven=True, config={"speculative_moe": {}}, environment=large, **flags)
    try:
        case.server.ready(400)
        asked = prompts([2, 3, 4] * 8, seed=4)
        assert answered_by(case.server, asked) == homes(case.plan, asked)
        assert at_once(case.server, prompts(MIXED), 96) == case.expected(prompts(MIXED), 96)
        assert {state["speculative_moe"]["laid_aside"] for state in case.server.info()} == {True}
        found = answered_by(case.server, asked)
        assert found in ([0, 1] * 12, [1, 0] * 12)  # in turn, as stock's
    finally:
        case.server.close()


def homes(plan, asked):
    """Where each goes, asked when the one before is answered."""
    arrivals = Arrivals(plan)
    return [arrivals.rank(prompt, [0, 0]) for prompt in asked]


def answered_by(server, asked):
    """The data-parallel rank that answered each of these prompts, one after the other."""
    return [asked_for(server, prompt, 2)["meta_info"]["dp_rank"] for prompt in asked]


def asked_for(server, asked, tokens):
    """The server's answer to a prompt, or its answers to several."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return json.loads(server.call("/generate", {"input_ids": asked, "sampling_params": sampling}))


@pytest.mark.soak
def test_experts_move_while_requests_are_served(tmp_path):
    case = Case(tmp_path, "Qwen3Moe", config={"speculative_moe": {"choose": False, "watch": 16}})
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        expected = case.expected(asked, 96)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(at_once, case.server, asked, 96)
            time.sleep(2)
            other = plan_of(case.model, prompts([48] * 12, seed=8), 2, seed=5)
            assert (other.rank != case.plan.rank).any()
            other.save(tmp_path / "plan.safetensors")
            assert pending.result(300) == expected
        assert at_once(case.server, asked, 64) == [one[:64] for one in expected]
        (state,) = case.server.info()
        per_expert = 3 * 64 * 128 * 4  # bytes: three matrices
        order, before = torch.from_numpy(other.order), torch.from_numpy(case.plan.rank).long()
        leaving = int((before.gather(1, order)[:, 4:] == 0).sum())  # of rank 0, which it held, to rank 1's places
        assert state["speculative_moe"]["moved_bytes"] == leaving * per_expert > 0
        (tmp_path / "plan.safetensors").write_bytes(b"no plan")
        assert at_once(case.server, asked, 64) == [one[:64] for one in expected]
        assert "forerun: the plan stays as it is" in case.server.told(1 << 20)
    finally:
        case.server.close()


def whole_dump(folder, rank, seconds=60):
    """The file that a rank has written to its end."""
    end = time.monotonic() + seconds
    while True:
        try:
            (path,) = folder.glob(f"*_{rank}.pt")
            torch.load(path, weights_only=True)
        except (ValueError, EOFError, RuntimeError, pickle.UnpicklingError):
            assert time.monotonic() < end, f"rank {rank} has not written {folder}"
            time.sleep(0.2)
        else:
            return path


def recording(records):
    """Flags of a server that records where tokens go."""
    told = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(records)}
    flags = {"expert_distribution_recorder_mode": "per_token", "chunked_prefill_size": 256}
    return {**flags, "disable_radix_cache": True, "environment": told}


def assert_recorded_as_transformers_routes(server, records, folder):
    """Has a server record some requests; each rank's file, of which the first one has transformers' routing."""
    asked = prompts([40, 7, 23])
    server.call("/start_expert_distribution_record", {})
    answers = server.generate(asked, 8)
    server.call("/stop_expert_distribution_record", {})
    server.call("/dump_expert_distribution_record", {})
    dumps = [whole_dump(records, rank) for rank in range(2)]  # each rank writes when it comes to it
    found = profile_dumps(dumps[:1], folder)
    whole = [torch.tensor(prompt + answer[:-1]) for prompt, answer in zip(asked, answers, strict=True)]
    expected = profile_model(load(folder), whole)
    assert found.identity == expected.identity
    assert (found.keys.tolist(), found.counts.tolist()) == (expected.keys.tolist(), expected.counts.tolist())
    return dumps


@pytest.mark.soak
def test_a_profile_of_what_sglang_recorded_is_transformers(tmp_path):
    records = tmp_path / "records"
    case = Case(tmp_path, "Qwen3Moe", config=None, **recording(records))
    try:
        case.server.ready(400)
        _, second = assert_recorded_as_transformers_routes(case.server, records, case.path)
    finally:
        case.server.close()
    with pytest.raises(ValueError, match="is rank 1's; expected rank 0's"):
        profile_dumps([second], case.path)


@pytest.mark.soak
def test_without_the_variable_the_server_is_stock(tmp_path):
    case = Case(tmp_path, "Qwen3Moe", config=None)
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        answers = [with_probabilities(case.server, prompt) for prompt in asked]
        assert [answer["output_ids"] for answer in answers] == case.expected(asked, 64)
        assert at_once(case.server, asked, 64) == case.expected(asked, 64)
        assert case.server.info() == [None]
        assert "forerun" not in case.server.told(1 << 20).replace("forerun_cpu_host", "").replace(
            "forerun -> forerun_adapters.sglang_plugin:register", ""
        ).replace("general plugin: forerun", "").replace("Loaded plugin forerun", "")
    finally:
        case.server.close()
    hidden = tmp_path / "hidden"  # what is found first stands for a distribution, and for a package
    for file, text in (
        ("forerun-0.dist-info/METADATA", "Metadata-Version: 2.1\nName: forerun\nVersion: 0\n"),
        ("forerun/__init__.py", "raise ImportError"),
        ("forerun_adapters/__init__.py", "raise ImportError"),
    ):
        (hidden / file).parent.mkdir(parents=True)
        (hidden / file).write_text(text)
    here = os.pathsep.join([str(SHIMS), os.environ.get("PYTHONPATH", "")])
    paths = os.pathsep.join([str(hidden), here])
    assert set(plugins(here)) - set(plugins(paths)) == {"forerun"}
    bare = Server(case.path, tmp_path / "bare", tp=2, ep=2, environment={"PYTHONPATH": paths})
    try:
        bare.ready(400)
        assert [with_probabilities(bare, prompt) for prompt in asked] == answers  # bit for bit
        assert "forerun" not in bare.told(1 << 20).replace("forerun_cpu_host", "")
    finally:
        bare.close()


def plugins(paths):
    """Names of the plugins that SGLang finds."""
    code = "from importlib.metadata import entry_points; print(*entry_points(group='sglang.srt.plugins').names)"
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def with_probabilities(server, prompt):
    """A request's tokens, and the logarithms of the prompt's and their probabilities; it is alone in its batches."""
    body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": 64}}
    told = json.loads(server.call("/generate", {**body, "return_logprob": True, "logprob_start_len": 0}))
    known = [told["meta_info"][name] for name in ("input_token_logprobs", "output_token_logprobs")]
    assert [len(one) for one in known] == [len(prompt), 64]
    return {"output_ids": told["output_ids"], "known": known}


@pytest.mark.soak
def test_a_placement_by_sglangs_own_option_is_exact(tmp_path):
    """What a plan is worth where forerun leaves the tokens to SGLang, as with DeepEP: experts lie by the plan.

    On 0.5.18 the router heeds no placement on a CPU, and the answers are others.
    """
    model = make_model(tmp_path / "model", "Qwen3Moe")
    plan = plan_of(load(model), prompts([48] * 12, seed=9), 2)
    assert (plan.order != sorted(plan.order[0].tolist())).any()
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps(location(plan)))
    records = tmp_path / "records"
    flags = {"init_expert_location": placement, "ep_dispatch_algorithm": "dynamic", **recording(records)}
    server = Server(model, tmp_path / "log", tp=2, ep=2, **flags)
    try:
        server.ready(400)
        asked = prompts(MIXED)
        expected = [continued(load(model), prompt, 64) for prompt in asked]
        if OLDEST:
            assert at_once(server, asked, 64) != expected
            return
        assert at_once(server, asked, 64) == expected
        for dump in assert_recorded_as_transformers_routes(server, records, model):
            lies = torch.load(dump, weights_only=True)["last_physical_to_logical_map"]
            assert lies.tolist() == location(plan)["physical_to_logical_map"]
    finally:
        server.close()


@pytest.mark.soak
def test_a_plan_of_another_model_is_refused(tmp_path):
    other = make_model(tmp_path / "other", "Mixtral")
    plan = plan_of(load(other), prompts([48] * 4), 2)
    plan.save(tmp_path / "plan.safetensors")
    section = {"plan": str(tmp_path / "plan.safetensors")}
    model = make_model(tmp_path / "model", "Qwen3Moe")
    server = Server(model, tmp_path / "log", config={"speculative_moe": section}, tp=2, ep=2)
    try:
        assert server.ended(400) != 0
        told = server.told(1 << 20)
        assert "the plan is of 'other' (3 MoE layers, top 2 of 8 experts), not of 'model'" in told
    finally:
        server.close()
    assert server.members() == []


@pytest.mark.soak
def test_olmoe_is_refused_as_stock_cannot_serve_it_either(tmp_path):
    refused = Case(tmp_path, "Olmoe")
    try:
        assert refused.server.ended(400) != 0
        told = refused.server.told(1 << 20)
        assert (
            "OlmoeDecoderLayer does not hand its tokens over in the way of SGLang's other models, and stock cannot"
            in told
        )
    finally:
        refused.server.close()
    for ranks in (1, 2):
        stock = Server(refused.path, tmp_path / f"log{ranks}", tp=ranks, ep=ranks)
        asked = prompts(MIXED)
        try:
            if ranks == 1:
                stock.ready(400)
                assert at_once(stock, asked, 64) == refused.expected(asked, 64)
            else:
                with pytest.raises((AssertionError, HTTPException, OSError, KeyError, json.JSONDecodeError)):
                    stock.ready(400).generate(asked, 4)
                assert "Expected hidden_size to be 128, but found: 64" in stock.told(1 << 20)
        finally:
            stock.close()


@pytest.mark.soak
def test_a_killed_rank_ends_the_server(tmp_path):
    case = Case(tmp_path, "Qwen3Moe")
    try:
        case.server.ready(400)
        asked = prompts(MIXED)
        expected = case.expected(asked, 64)
        assert case.server.generate(asked, 64) == expected
        victims = [pid for pid in case.server.members() if b"TP1" in _command(pid)]
        assert len(victims) == 1, [(pid, _command(pid)) for pid in case.server.members()]
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(case.server.generate, asked, 400)
            time.sleep(1)
            os.kill(victims[0], signal.SIGKILL)
            with pytest.raises((HTTPException, OSError, json.JSONDecodeError, KeyError)) as failed:
                pending.result(300)
            assert not isinstance(failed.value, TimeoutError)  # nobody is left waiting
        case.server.ended(300)
        end = time.monotonic() + 60
        while case.server.members() and time.monotonic() < end:
            time.sleep(1)
        assert case.server.members() == []
    finally:
        case.server.close()


def _command(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
