"""Engines killed again and again under load, frozen, and vLLM's own benchmark: no answer wrong, none missing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

import openai
import psutil
from fronts import START, Served, ask, streamed, text_of, until, words

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]
ROUNDS = int(os.environ.get("FORERUN_SERVE_ROUNDS", "52"))
# `vllm bench serve`, whose command wants the metadata of a distribution that the CPU build is not named like.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
BESIDE, PAUSE = 5.0, 2.0  # seconds of full load after a kill; between a client's requests from then on
LONGEST = 90.0  # seconds: the chain's time-out, a retry, and the work itself


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    front = Served(tmp_path_factory.mktemp("served"))
    try:
        yield front.ready()
    finally:
        took, left = front.close()
    assert left == [] and took < 30


class Load:
    """Clients that ask without a pause, or with one; `told` has what each answer was and the seconds that it took."""

    def __init__(self, served, bodies):
        self.told, self.pause, self._over = [], 0.0, threading.Event()
        self._client, self._bodies = served.client(), bodies
        self._expected = [text_of(served.alone(**body)) for body in bodies]

    def run(self, number):
        chosen = random.Random(number)
        while not self._over.is_set():
            i, stream = chosen.randrange(len(self._bodies)), chosen.random() < 0.5
            began = time.monotonic()
            try:
                answer = ask(self._client, stream=stream, **self._bodies[i])
                exact = (streamed(answer) if stream else text_of(answer)) == self._expected[i]
                told = "exact" if exact else f"wrong: prompt {i}, streamed {stream}"
            except openai.APIError as error:  # with a body, also where an event of a stream says it
                told = "error" if error.body else f"unclean: {error!r}"
            except Exception as error:
                told = f"unclean: {error!r}, prompt {i}, streamed {stream}, at {time.time():.0f}"
            self.told.append((told, time.monotonic() - began))
            self._over.wait(self.pause)

    def __enter__(self):
        self._pool = ThreadPoolExecutor(6)
        self._asked = [self._pool.submit(self.run, number) for number in range(6)]
        return self

    def __exit__(self, *error):
        self._over.set()
        for one in self._asked:
            one.result(300)
        self._pool.shutdown()
        self._client.close()


def victims(server):
    """The API server; the engine's core; all of the engine with its keeper."""
    below = server.children(recursive=True)
    cores = [child for child in below if "EngineCore" in " ".join(child.cmdline())]
    assert cores, [child.cmdline() for child in below]
    return [[server], cores, [psutil.Process(os.getpgid(server.pid)), server, *below]]


def wait_until_whole(served, restarts):
    until(lambda: served.counted("forerun:front_engine_restarts") > restarts, 120, "it is started again")
    until(served.is_whole, START, "both engines are up")


def test_engines_killed_in_turn_cost_no_wrong_answer(served):
    chosen, bodies = random.Random(0), [{"prompt": words(100 + i, 60 + 160 * i), "tokens": 64} for i in range(9)]
    counts = {"exact": 0, "error": 0}
    with Load(served, bodies) as load:
        for number in range(ROUNDS):
            time.sleep(chosen.uniform(0.5, 4.0))
            server = served.servers()[number % 2]
            restarts = served.counted("forerun:front_engine_restarts")
            for process in victims(server)[number // 2 % 3]:
                process.send_signal(signal.SIGKILL)
            time.sleep(BESIDE)
            load.pause = PAUSE  # the engine starts on the cores that the load is computed on
            wait_until_whole(served, restarts)
            load.pause = 0.0
            told, load.told[:] = list(load.told), []
            assert {what for what, _ in told} <= {"exact", "error"}, [what for what, _ in told if what not in counts]
            assert max(seconds for _, seconds in told) < LONGEST
            for what in counts:
                counts[what] += sum(one == what for one, _ in told)
            print(f"round {number + 1}: {counts}, {max(seconds for _, seconds in told):.1f} s at most", flush=True)
    assert counts["exact"] > max(ROUNDS, 5 * counts["error"])
    until(lambda: served.counted(r"vllm:num_requests_(running|waiting)\{") == 0, 60, "nothing is left running")
    chains = served.routed("chain")
    body = {"prompt": words(300, 900)}
    assert text_of(served.ask(**body)) == text_of(served.alone(**body))
    assert served.routed("chain") == chains + 1


def test_a_frozen_engine_is_taken_out_and_comes_back(served):
    until(served.is_whole, START, "both engines are up")
    tree = [served.servers()[1], *served.servers()[1].children(recursive=True)]
    with Load(served, [{"prompt": words(400 + i, 100 + 300 * i)} for i in range(4)]) as load:
        for process in tree:
            process.suspend()
        try:
            until(lambda: not served.is_whole(), 120, "it is taken out")
            load.told.clear()
            until(lambda: sum(told == "exact" for told, _ in load.told) > 10, 120, "the other one answers")
        finally:
            for process in tree:
                process.resume()
        until(served.is_whole, 120, "it is back")
    assert {told for told, _ in load.told} <= {"exact", "error"}
    assert max(seconds for _, seconds in load.told) < LONGEST


def test_vllms_own_benchmark_runs_against_it(served, tmp_path):
    until(served.is_whole, START, "both engines are up")
    command = [sys.executable, "-c", BENCH, "--backend", "openai"]
    command += ["--base-url", served.url, "--model", "tiny", "--tokenizer", str(served.log.parent / "model")]
    command += ["--dataset-name", "random", "--random-input-len", "700", "--random-output-len", "16"]
    command += ["--num-prompts", "12", "--max-concurrency", "3", "--ignore-eos", "--save-result"]
    command += ["--result-dir", str(tmp_path), "--result-filename", "bench.json"]
    chains = served.routed("chain")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["completed"] == 12 and told["total_output_tokens"] == 12 * 16
    assert served.routed("chain") > chains
