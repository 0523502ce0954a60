"""The connector in vLLM's server: several processes an engine, HTTP, Prometheus."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from engines import SECRET, make_model, make_tokenizer, prompt

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
BOUNDS, LAYERS, TOKEN_BYTES = [0, 256, 450], 3, 2 * 2 * 32 * 4


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def call(port, path, body=None, timeout=120):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


class Server:
    def __init__(self, model, log):
        self.port, self.listen, self.log = free_port(), f"127.0.0.1:{free_port()}", log
        transfer = {
            "kv_connector": "RunaheadConnector",
            "kv_connector_module_path": "forerun.runahead.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"listen": self.listen, "timeout": 60},
        }
        # The `vllm` command of the CPU build asks for the metadata of a distribution named vllm, and ends.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", "tiny"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--block-size", "32"]
        command += ["--max-model-len", "1024", "--enforce-eager", "--kv-transfer-config", json.dumps(transfer)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        settings |= {"FORERUN_RUNAHEAD_SECRET": SECRET, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **settings})

    def ready(self, seconds=900):
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            try:
                call(self.port, "/health", timeout=5)
                return
            except (OSError, urllib.error.URLError):
                time.sleep(1)

    def complete(self, tokens, count, part=None):
        body = {"model": "tiny", "prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"kv_transfer_params": {"runahead": part}} if part else {}
        return json.loads(call(self.port, "/v1/completions", body))["choices"][0]["text"]

    def counted(self, name, label=""):
        for line in call(self.port, "/metrics").splitlines():
            if line.startswith(f"forerun:runahead_{name}{{") and label in line:
                return float(line.split()[-1])
        return 0.0

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


def test_two_servers_are_a_chain(tmp_path):
    model = make_model(tmp_path / "model", layers=LAYERS)
    make_tokenizer(model)
    servers = [Server(model, tmp_path / f"{name}.log") for name in ("first", "last")]
    try:
        for server in servers:
            server.ready()
        first, last = servers
        tokens, chain = prompt(1, BOUNDS[-1]), os.urandom(16).hex()
        expected = first.complete(tokens, 64)
        parts = (
            (first, tokens[: BOUNDS[1]], 1, {"chain": chain, "start": 0, "end": BOUNDS[1], "next": last.listen}),
            (last, tokens, 64, {"chain": chain, "start": BOUNDS[1], "end": BOUNDS[2]}),
        )
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(server.complete, *rest) for server, *rest in parts]
            answers = [one.result(120) for one in asked]
        assert answers[1] == expected
        end = time.monotonic() + 60  # counts come with the engine's next step
        while last.counted("bytes_loaded_total") != BOUNDS[1] * TOKEN_BYTES * LAYERS:
            assert time.monotonic() < end, call(last.port, "/metrics")
            last.complete([5, 6, 7], 2)
        assert first.counted("bytes_sent_total") == BOUNDS[1] * TOKEN_BYTES * LAYERS
        assert last.counted("recomputes_total") == 0
        assert last.counted("wait_seconds_total", f'before="{first.listen}"') > 0
        assert (last.counted("wait_share_count"), first.counted("wait_share_count")) == (1, 0)
        assert 0 < last.counted("wait_share_sum") <= 1
    finally:
        for server in servers:
            server.close()
