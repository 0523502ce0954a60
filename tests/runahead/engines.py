"""Real vLLM engines in processes of their own, tiny models for them, and chains over them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from functools import cache
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
from engine_program import ENVIRONMENT, serve

SECRET = "for tests"
VOCABULARY = 512
# Greedy tokens are compared exactly. Log-probabilities are in float32 and up to about -10: attention over another split
# sums in another order, which moves them by some units of 1e-6.
TOLERANCE = 1e-4
START, ANSWER = 540, 120  # seconds; the first start takes 15 s on an idle machine, others 3


def make_model(folder, *, layers=3, heads=4, kv_heads=2, head_size=32, dtype="float32", kind="llama"):
    """A decoder with random weights: MHA, GQA or MQA by `kv_heads`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(0)
    model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=heads * head_size,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_size,
            max_position_embeddings=4096,
            initializer_range=0.1,  # so that logits lie apart
            dtype=getattr(torch, dtype),
        )
    ).to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)


def make_tokenizer(folder):
    """A tokenizer of one word a token, beside the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@cache
def forking():
    """Processes that have imported vLLM already: it takes longer than to start an engine."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine_imports"])
    kept = {name: os.environ.get(name) for name in (*ENVIRONMENT, "PYTHONPATH")}
    os.environ |= ENVIRONMENT  # what is imported reads it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


class Engine:
    """One engine; `begin` a batch of requests, then `finish` it.

    Args:
        metadata: A folder with distributions' metadata: vLLM is to find the connector by its entry point there.
    """

    def __init__(self, model, *, chained=True, metadata=None, environment=(), policy="recompute", **options):
        extra = {name: options.pop(name) for name in ("timeout", "transport", "listen") if name in options}
        options = {"model": model, "dtype": "float32", "max_model_len": 2048, "block_size": 32, **options}
        options = {"max_num_batched_tokens": 2048, "enforce_eager": True, "enable_prefix_caching": False, **options}
        if chained:
            module = {"kv_connector_module_path": "forerun.runahead.vllm"} if metadata is None else {}
            extra = {"timeout": 10.0, **extra}
            options["connector"] = {"kv_load_failure_policy": policy, "kv_connector_extra_config": extra, **module}
        if metadata is not None:
            options["path"] = [str(metadata)]
        descriptor, log = tempfile.mkstemp(suffix=".log", prefix="forerun-engine-")
        os.close(descriptor)
        self._log, context = Path(log), forking()
        self._channel, theirs = context.Pipe()
        told = {"FORERUN_RUNAHEAD_SECRET": SECRET, **dict(environment)}
        self.process = context.Process(target=serve, args=(options, theirs, log, told))
        self.process.start()
        theirs.close()

    def ready(self):
        """Waits until the engine can be asked."""
        told = self.finish(START)
        self.address, self.model = told["address"], told["model"]
        assert told["release"].startswith(os.environ.get("FORERUN_VLLM", "0.32"))  # `make test-vllm` sets it
        return self

    @property
    def log(self):
        return self._log.read_text(errors="replace")

    def begin(self, requests):
        self._channel.send(requests)

    def finish(self, timeout=ANSWER):
        try:
            if self._channel.poll(timeout):
                return self._channel.recv()
            told = f"no answer in {timeout} s"
        except (EOFError, ConnectionError):
            told = "it ended"
        raise AssertionError(f"{told}; the engine said:\n{self.log[-4000:]}")

    def ask(self, requests):
        self.begin(requests)
        return self.finish()

    def counts(self):
        """What the engine has counted so far."""
        return self.ask([])

    def close(self):
        self._channel.close()  # which ends it, and its workers
        self.process.join(20)
        self.kill()
        self._log.unlink(missing_ok=True)

    def kill(self):
        self.process.kill()
        self.process.join(30)


def start(*engines):
    """The engines, ready; none is left behind if one does not start."""
    try:
        for engine in engines:
            engine.ready()
        for engine in engines:
            alone(engine, prompt(0, 100), 2)  # the first request is slow
        return list(engines)
    except BaseException:
        for engine in engines:
            engine.close()
        raise


def prompt(seed, length):
    return np.random.default_rng(seed).integers(4, VOCABULARY, length).tolist()


def alone(engine, tokens, count=64):
    return engine.ask([{"tokens": tokens, "count": count}])["answers"][0]


def parts(tokens, bounds, engines, count, chain=None):
    """What each engine of a chain is asked: requests in the engines' order."""
    chain = chain or os.urandom(16).hex()
    requests = []
    for i, (start, end) in enumerate(pairwise(bounds)):
        is_last = i == len(bounds) - 2
        follows = None if is_last else "{}:{}".format(*engines[i + 1].address)
        part = {"chain": chain, "start": start, "end": end, "next": follows}
        requests.append({"tokens": tokens[:end], "count": count if is_last else 1, "runahead": part})
    return requests


def run_chain(engines, tokens, bounds, count=64):
    """The last engine's answer, and what every engine counted since it started."""
    for engine, request in zip(engines, parts(tokens, bounds, engines, count), strict=True):
        engine.begin([request])
    told = [engine.finish() for engine in engines]
    return told[-1]["answers"][0], told


def failures(told):
    """Requests that an engine computed without its chain."""
    return told["failures"]


def assert_nothing_left(*engines, seconds=20):
    """No block, no byte and no note of a request that is over."""
    end = time.monotonic() + seconds
    for engine in engines:
        while any((left := engine.counts()["left"]).values()):
            assert time.monotonic() < end, left
            time.sleep(0.05)


def assert_same(answer, expected):
    """Every greedy token, and the first token's log-probabilities where both name a token."""
    assert answer["tokens"] == expected["tokens"]
    shared = set(answer["logits"]) & set(expected["logits"])
    assert len(shared) >= 18  # of 20; ties at the end of the list may differ
    assert max(abs(answer["logits"][token] - expected["logits"][token]) for token in shared) <= TOLERANCE
