"""SGLang's own server on a CPU, as a user starts it: one process group, a log, and an end to it in any case."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIMS = ROOT / "tests" / "hosts" / "sglang_shims"
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "mem-fraction-static": "0.5",
}
FLAGS = {
    **ON_CPU,
    "max-total-tokens": "4096",
    "max-running-requests": "16",
    "context-length": "512",
    "watchdog-timeout": "300",
    "log-level": "info",
}
SWITCHES = ("disable-overlap-schedule", "disable-cuda-graph", "skip-server-warmup")
GREEDY = {"temperature": 0, "ignore_eos": True}


def free_port():
    """One below those that connections are given: SGLang takes further ones at a distance from it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """`python -m sglang.launch_server` with forerun's configuration, or none.

    Args:
        model: Folder of the model.
        log: File of everything that its processes print.
        config: Of FORERUN_SGLANG: an object, or the text itself; None: the variable is not set.
        python: Of the environment that has SGLang; None: this one's.
        flags: Further ones, as `tp=2`, underscores for dashes; True for a switch.
    """

    def __init__(self, model, log, *, config=None, environment=(), python=None, **flags):
        self.port, self.log = free_port(), Path(log)
        given = {**FLAGS, **dict.fromkeys(SWITCHES, True)}
        given |= {name.replace("_", "-"): value for name, value in flags.items()}
        ranks = int(given.get("tp", 1))
        command = [str(python or sys.executable), "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        for name, value in given.items():
            command += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
        paths = [SHIMS, ROOT / "plugins", ROOT / "adapters", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        variables = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(p) for p in paths if p)),
        }
        variables.pop("FORERUN_SGLANG", None)
        if ranks > 1:
            cores = sorted(os.sched_getaffinity(0))
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(ranks))
        if config is not None:
            variables["FORERUN_SGLANG"] = config if isinstance(config, str) else json.dumps(config)
        variables |= dict(environment)
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)

    def ready(self, seconds=600):
        """Waits until it can be asked."""
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, f"the server ended:\n{self.told()}"
            assert time.monotonic() < end, f"no answer in {seconds} s:\n{self.told()}"
            try:
                self.call("/health", seconds=5)
                return self
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)

    def ended(self, seconds=180):
        """Waits until it has ended by itself; its exit status."""
        return self.process.wait(seconds)

    def says(self, text, seconds=400):
        """Waits until one of its processes has printed this; the others may go on."""
        end = time.monotonic() + seconds
        while text not in self.told(1 << 20):
            assert time.monotonic() < end, f"not {text!r} in {seconds} s:\n{self.told()}"
            time.sleep(0.5)

    def told(self, end=6000):
        return self.log.read_text(errors="replace")[-end:]

    def call(self, path, body=None, seconds=120):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read().decode()

    def generate(self, prompts, tokens, seconds=240):
        """Greedy continuations, token ids; prompts are one batch, or one prompt."""
        body = {"input_ids": prompts, "sampling_params": {**GREEDY, "max_new_tokens": tokens}}
        answer = json.loads(self.call("/generate", body, seconds))
        many = isinstance(answer, list)
        found = [one["output_ids"] for one in (answer if many else [answer])]
        return found if many else found[0]

    def info(self):
        """What forerun says of itself, one entry for each scheduler that answers."""
        told = json.loads(self.call("/server_info"))
        return [state.get("forerun") for state in told["internal_states"]]

    def members(self):
        """Processes of the server that are there."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
                except OSError:
                    continue
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def close(self):
        """Ends all its processes: the first one may have ended before the others."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                break
            end = time.monotonic() + 20
            while (self.process.poll() is None or self.members()) and time.monotonic() < end:
                time.sleep(0.05)
        self.process.wait(30)
