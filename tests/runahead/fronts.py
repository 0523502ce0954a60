"""`forerun runahead serve` as a process of its own, with real engines, and what clients see of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import psutil
from engines import make_model, make_tokenizer, prompt

BLOCK, LEAST = 32, 256
START = 900  # seconds; two engines start in 30 s on an idle machine
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if tools %}w3 {% endif %}w2"


def words(seed, length):
    return " ".join(f"w{token}" for token in prompt(seed, length))


def until(holds, seconds, what):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.1)
    return found


class Front:
    """A front as a process of its own."""

    def __init__(self, folder, command, settings):
        self.log = Path(folder) / "front.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "forerun", "runahead", "serve", *command, "--port", "0"],
                stdout=file,
                stderr=file,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **settings},
            )

    def ready(self):
        def told():
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            return re.search(r"at (http://\S+?)/v1:", self.log.read_text())

        self.url = until(told, START, "the front serves")[1]
        return self

    def client(self, url=None):
        """Of the front, or of what is at this address; who takes it closes it."""
        return openai.OpenAI(base_url=f"{url or self.url}/v1", api_key="none", max_retries=0, timeout=180)

    def ask(self, url=None, **body):
        with self.client(url) as client:
            return ask(client, **body)

    def counted(self, pattern, url=None):
        """The sum of all samples of metrics whose line begins so."""
        with urllib.request.urlopen(f"{url or self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(pattern, line))

    def routed(self, route, why=""):
        return self.counted(rf'forerun:front_requests_total{{route="{route}",why="{why}')

    def close(self):
        """Ends it as a user does; returns the seconds that it took, and what was left of it."""
        started = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        took = time.monotonic() - began
        return took, psutil.wait_procs(started, timeout=15)[1]


class Served(Front):
    """A front with two engines of a tiny model."""

    def __init__(self, folder, *more):
        folder = Path(folder)
        self.model = make_model(folder / "model")
        make_tokenizer(self.model)
        (folder / "chat.jinja").write_text(TEMPLATE)
        command = [self.model, "--engines", "2"]
        command += ["--least", str(LEAST), "--logs", str(folder), "--chain-timeout", "60", "--timeout", "120", *more]
        command += ["--served-model-name", "tiny", "--chat-template", str(folder / "chat.jinja")]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", str(BLOCK)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # a core each, as it is by default
        super().__init__(folder, command, settings)

    def ready(self):
        super().ready()
        found = dict(re.findall(r"engine (\d) is up: (http://\S+)", self.log.read_text()))
        self.engines = [found[number] for number in sorted(found)]
        for url in (*self.engines, self.url):  # the first request of an engine is slow
            self.ask(url, prompt=words(0, 300), tokens=2)
        return self

    def joined(self, folder, *more):
        """Another front before the same engines."""
        lines = [server.cmdline() for server in self.servers()]
        listening = [json.loads(line[line.index("--kv-transfer-config") + 1]) for line in lines]
        addresses = [told["kv_connector_extra_config"]["listen"] for told in listening]
        join = [f"--join={url}={address}" for url, address in zip(self.engines, addresses, strict=True)]
        return Front(folder, [self.model, "--engines", "0", *join, *more], {}).ready()

    def alone(self, **body):
        """What one engine answers that has not seen the prompt."""
        return self.ask(self.engines[0], salt=os.urandom(16).hex(), **body)

    def servers(self):
        """Processes of the engines' API servers, in the engines' order."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = child.cmdline()
            except psutil.Error:
                continue
            if "vllm.entrypoints.openai.api_server" in line and "forerun.runahead.keeper" not in line:
                found.setdefault(line[line.index("--port") + 1], child)
        return [found.get(url.rpartition(":")[2]) for url in self.engines]

    def is_whole(self):
        return self.counted("forerun:front_engines_up") == 2


def ask(client, *, salt=None, tokens=64, **body):
    """Greedy by default; a chat where there are messages."""
    body = {"temperature": 0, **body}
    more = {"ignore_eos": True, **body.pop("extra", {}), **({"cache_salt": salt} if salt else {})}
    made = client.chat.completions if "messages" in body else client.completions
    return made.create(model="tiny", max_tokens=tokens, extra_body=more, **body)


def text_of(answer):
    choice = answer.choices[0]
    return choice.text if hasattr(choice, "text") else choice.message.content


def streamed(chunks):
    parts = [choice for chunk in chunks for choice in chunk.choices]
    return "".join((part.text if hasattr(part, "text") else part.delta.content) or "" for part in parts)
