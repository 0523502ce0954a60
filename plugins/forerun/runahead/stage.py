"""One engine's part in a chain: what the front says of a request, and what follows from it step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forerun.runahead.transport import Address, parse_address

__all__ = ["Over", "Part", "Stage", "Stages", "parse_stage"]


@dataclass(frozen=True)
class Stage:
    """A request's part in a chain.

    Args:
        chain: 16 bytes, of all its parts alike.
        start: Tokens before the engine's own context; they come from the engine before it. 0: it is the first.
        end: Where the own context ends; for all but the last engine the prompt ends there.
        next: The receiver of the engine after it; None: it is the last.
        prompt: `forerun.runahead.prefixes.digest` of the tokens before the context's end; None: taken on trust.
    """

    chain: bytes
    start: int
    end: int
    next: Address | None
    prompt: str | None = None


class Part(NamedTuple):
    """What a worker does for a request in one step."""

    stage: Stage
    blocks: list[int]  # of the cache, in the order of the tokens
    load: tuple[int, int] | None  # tokens that come from the engine before
    send: tuple[int, int] | None  # tokens that go to the engine after; of them, those before `load`'s end are forwarded


class Over(NamedTuple):
    """A request that is over."""

    chain: bytes
    misses: Address | None  # the engine after it, if that waits for what no longer comes


def parse_stage(params: Mapping[str, Any] | None, block: int) -> Stage | None:
    """Reads a request's `kv_transfer_params["runahead"]`; None where there is none.

    Raises:
        ValueError: It is malformed, or begins or ends within a block where it may not.
    """
    given = (params or {}).get("runahead")
    if given is None:
        return None
    try:
        chain, start, end = bytes.fromhex(given["chain"]), given["start"], given["end"]
        follows = parse_address(given["next"]) if given.get("next") is not None else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"runahead parameters {given!r} are malformed: {error!r}") from error
    if len(chain) != 16 or type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise ValueError(f"runahead parameters {given!r}: expected 32 hex digits, and 0 <= start < end")
    if start % block or (follows is not None and end % block):
        raise ValueError(f"tokens {start} to {end} do not keep to blocks of {block}, as the engine's cache does")
    prompt = given.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"runahead parameters {given!r}: expected the digest of the prompt as text")
    return Stage(chain, start, end, follows, prompt)


@dataclass
class _Request:
    """What the scheduler's half remembers of a request."""

    stage: Stage
    since: float  # when it was first asked for (s, monotonic)
    loads: int = 0  # tokens that the next step loads
    placed: bool = False  # it had its one chance to load
    sent: int = 0
    blocks: list[int] = field(default_factory=list)


class Stages:
    """The scheduler's half: when a request may start, and what a worker is to do for it.

    A request waits, outside of the engine, until the first layer of all tokens before its context has come: from then
    on the engine before it is at its last step for them, and every step sends a layer before it waits for one. So
    engines that are each other's neighbour in several chains cannot wait for each other in a circle.

    Args:
        block: Tokens of a cache block.
        timeout: Seconds that a request waits before it is computed without the chain.
    """

    def __init__(self, block: int, timeout: float) -> None:
        self._block, self._timeout = block, timeout
        self._requests: dict[str, _Request] = {}
        self._owners: dict[bytes, str] = {}  # the one request of each chain
        self._apart: set[str] = set()  # requests that a chain is not for
        self._finished: list[Over] = []
        self._reach: Mapping[bytes, int] = {}
        self._broken: frozenset[bytes] = frozenset()
        self.given_up = 0  # requests that waited in vain, or that their chain was not for
        self.failed = 0  # requests whose load did

    def __contains__(self, name: str) -> bool:
        return name in self._requests or name in self._apart

    def refuse(self, name: str, stage: Stage | None = None) -> None:
        """A request takes no part in its chain, once: the prompt is another one, or what it says of it means nothing.

        The engine after it, where that is known, is not left to wait.
        """
        if name in self._apart:
            return
        if stage is not None and stage.chain not in self._owners:
            self._finished.append(Over(stage.chain, stage.next))
        self._apart.add(name)
        self.given_up += 1

    def note(self, reach: Mapping[bytes, int], broken: frozenset[bytes], failed: frozenset[bytes]) -> list[int]:
        """What the workers have: tokens of the first layer, chains cut off, chains whose load failed.

        Returns the blocks that hold nothing true until they are computed again.
        """
        self._reach, self._broken = reach, broken
        hit = [request for request in self._requests.values() if request.stage.chain in failed]
        self.failed += len(hit)
        return [block for request in hit for block in request.blocks]

    def matched(self, name: str, stage: Stage, tokens: int, computed: int) -> int | None:
        """Tokens beyond those computed that come from the chain; None: not known yet."""
        if name in self._apart or self._owners.setdefault(stage.chain, name) != name:
            self._apart.add(name)  # such as one of several samples of a prompt: what comes, comes once
            return 0
        request = self._requests.setdefault(name, _Request(stage, time.monotonic()))
        if request.placed or computed >= stage.start or stage.start >= tokens:
            return 0
        if self._reach.get(stage.chain, 0) >= stage.start:
            return stage.start - computed
        if stage.chain in self._broken or time.monotonic() - request.since > self._timeout:
            request.placed = True
            self.given_up += 1
            return 0
        return None

    def place(self, name: str, loads: int) -> None:
        """The engine has room for a request, and will take so many of its tokens from the chain."""
        if (request := self._requests.get(name)) is not None:
            request.loads, request.placed = (loads, True) if not request.placed else (0, True)

    def part(self, name: str, computed: int, tokens: int, blocks: list[int], *, is_new: bool) -> Part | None:
        """What a worker does for a request in the step that computes so many tokens after those computed."""
        if (request := self._requests.get(name)) is None:
            return None
        request.blocks = list(blocks) if is_new else request.blocks + blocks
        load = (computed - request.loads, computed) if request.loads else None
        request.loads = 0
        send, reached = None, min(request.stage.end, computed + tokens) // self._block * self._block
        if request.stage.next is not None and reached > request.sent:
            send = (request.sent, reached)
            request.sent = reached
        return Part(request.stage, request.blocks, load, send) if load or send else None

    def finish(self, name: str) -> None:
        """A request is over, answered or not."""
        self._apart.discard(name)
        if (request := self._requests.pop(name, None)) is not None:
            stage = request.stage
            missed = stage.next is not None and request.sent < stage.end
            self._finished.append(Over(stage.chain, stage.next if missed else None))
            self._owners.pop(stage.chain, None)

    @property
    def waiting(self) -> bool:
        """Whether a request waits for its chain."""
        return any(not request.placed for request in self._requests.values())

    def take_finished(self) -> list[Over]:
        """What is over here since the last call."""
        finished, self._finished = self._finished, []
        return finished
