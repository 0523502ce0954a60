"""One engine as its own API shows it: what it is, and how long it takes to the first token of a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import httpx
import numpy as np

from forerun.runahead.counts import labels_of
from forerun.runahead.transport import Address

__all__ = ["EngineClient", "Prompt", "chain_parts"]


@dataclass(frozen=True)
class EngineClient:
    """An engine that serves an OpenAI-compatible API.

    Args:
        url: Of the API, without a path.
        address: Where its connector hears the engine before it.
        model: Name that it serves the model by.
        timeout: Seconds that one answer may take.
    """

    url: str
    address: Address
    model: str
    timeout: float = 600.0

    @classmethod
    def connect(cls, url: str, address: Address, timeout: float = 600.0) -> EngineClient:
        """An engine, by the first model that it serves.

        Raises:
            RuntimeError: It does not answer.
        """
        answer = cls(url, address, "", timeout).ask("/v1/models")
        return cls(url, address, str(answer.json()["data"][0]["id"]), timeout)

    def cache(self) -> Mapping[str, str]:
        """Settings of its cache, such as `block_size` and `enable_prefix_caching`.

        Raises:
            RuntimeError: It does not answer, or does not tell.
        """
        found = labels_of(self.ask("/metrics").text, "vllm:cache_config_info")
        if not found:
            raise RuntimeError(f"{self.url}/metrics says nothing of the cache's settings; expected a vLLM engine")
        return found

    def prefill(self, tokens: Sequence[int], part: Mapping[str, Any] | None = None) -> float:
        """Seconds to the first token of a prompt; `part` is its part in a chain.

        Raises:
            RuntimeError: It does not answer, or not in time.
        """
        body: dict[str, Any] = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0}
        body |= {"ignore_eos": True, "kv_transfer_params": {"runahead": dict(part)} if part else None}
        began = time.monotonic()
        self.ask("/v1/completions", body)
        return time.monotonic() - began

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """The answer to one request.

        Raises:
            RuntimeError: It does not answer, not in time, or with an error.
        """
        try:
            url = self.url.rstrip("/") + path
            answer = httpx.get(url, timeout=30) if body is None else httpx.post(url, json=body, timeout=self.timeout)
        except httpx.HTTPError as error:
            raise RuntimeError(f"the engine at {self.url} does not answer {path}: {error!r}") from error
        _check(self.url, path, answer)
        return answer

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to a request with `"stream": true`, event by event.

        Raises:
            RuntimeError: It does not answer, not in time, or with an error.
        """
        try:
            with httpx.stream("POST", self.url.rstrip("/") + path, json=body, timeout=self.timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                _check(self.url, path, answer)
                for line in answer.iter_lines():
                    content = line.removeprefix("data: ")
                    if content not in (line, "[DONE]"):
                        yield json.loads(content)
        except httpx.HTTPError as error:
            raise RuntimeError(f"the engine at {self.url} does not answer {path}: {error!r}") from error


class Prompt:
    """Prompts of random tokens, no two of which begin alike."""

    def __init__(self, vocabulary: int, seed: int | None = None) -> None:
        self._vocabulary, self._random = vocabulary, np.random.default_rng(seed)

    def __call__(self, tokens: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._vocabulary, tokens)]


def chain_parts(chain: bytes, contexts: Sequence[int], addresses: Sequence[Address]) -> list[dict[str, Any]]:
    """What each engine of a chain is told, in order, as `kv_transfer_params["runahead"]`.

    Args:
        chain: 16 bytes that no other chain has.
        contexts: Tokens of each engine's own context, what engines hold in their caches included in the first.
        addresses: Where each engine hears the one before it.
    """
    ends = list(accumulate(contexts))
    parts: list[dict[str, Any]] = []
    for i, end in enumerate(ends):
        follows = "{}:{}".format(*addresses[i + 1]) if i + 1 < len(ends) else None
        parts.append({"chain": chain.hex(), "start": end - contexts[i], "end": end, "next": follows})
    return parts


def _check(url: str, path: str, answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise RuntimeError(f"the engine at {url} answers {path} with {answer.status_code}: {answer.text[:500]}")
