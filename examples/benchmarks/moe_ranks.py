"""One rank of `moe_serving.py`: every model, every way to serve it, every rate of its link.

    python moe_ranks.py SETTINGS.json RANK

Rank 0 writes what all ranks measured.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from links import limit
from moe_models import SHAPES, Pinned, pinned
from moe_traffic import Traffic
from moe_ways import WAYS, Plans, Routing, Way, plans_of
from torch import Tensor, nn

from forerun.moe.deepspeed_state import speculated
from forerun.moe.requests import assign


def joined(settings: dict[str, Any], rank: int) -> None:
    ranks = settings["ranks"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    patience = datetime.timedelta(seconds=300)
    store = f"file://{settings['store']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    deepspeed.init_distributed("gloo", verbose=False)


class Clock:
    """Seconds that modules take, each call of each."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.seconds: list[float] = []

    @contextmanager
    def running(self) -> Iterator[list[float]]:
        self.seconds, begun = [], [0.0]
        hooks = [
            module.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
            for module in self.modules
        ]
        hooks += [
            module.register_forward_hook(lambda *_: self.seconds.append(time.perf_counter() - begun[0]))
            for module in self.modules
        ]
        try:
            yield self.seconds
        finally:
            for hook in hooks:
                hook.remove()


class Serving:
    """A model and the requests that its ranks answer."""

    def __init__(self, name: str, pin: Pinned, settings: dict[str, Any]) -> None:
        self.name, self.model, self.settings = name, pin.model, settings
        self.folded = pin.folded
        self.ranks, self.here = dist.get_world_size(), dist.get_rank()
        self.length, self.steps = settings["length"][name], settings["decode"]
        count = settings["requests"][name]
        self.requests = pin.requests(1, self.ranks * count, self.length + self.steps)
        batches = [pin.requests(1000 + at, self.ranks * count, self.length) for at in range(settings["calibration"])]
        self.plans: Plans = plans_of(self.model, batches, settings["effort"], self.folded)

    def split(self, plan: Any) -> np.ndarray:
        """`[n]` the rank of each request: as the plan expects, or in order; where attention is parallel, every rank."""
        if self.folded:
            return np.full(len(self.requests), self.here)
        if plan is None:
            return np.arange(len(self.requests)) // (len(self.requests) // self.ranks)
        return assign(list(self.requests[:, : self.length]), plan, limit=1.0)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Any:
        return self.model(ids[:, : self.length], use_cache=True)

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: Any) -> None:
        for step in range(self.length, self.length + self.steps):
            self.model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)

    def counted(self, ids: Tensor, layers: list[nn.Module]) -> dict[str, Any]:
        """Bytes and experts of a prefill, bytes of decoding, and what is said: the last token's logits."""
        row = self.model.config.hidden_size * 4
        with Routing(self.model) as routing, Traffic(row) as sent:
            answer = self.prefill(ids)
        # What the classic layer pads every expert to, by its own count.
        classics = [getattr(layer, "classic", None) for layer in layers]
        most = [0 if one is None else int(one.deepspeed_moe.exp_counts.max()) for one in classics]
        with Traffic(row) as then:
            self.decode(ids, answer.past_key_values)
        per = len(layers)
        return {
            "experts": routing.experts,
            "most": most,
            "logits": answer.logits[:, -1].clone(),
            "prefill": {"rows": dict(sent.rows), "index": sent.index.total(), "calls": sent.calls.total() / per},
            "decode": {"rows": then.rows.total() / self.steps, "index": then.index.total() / self.steps},
        }

    def timed(self, ids: Tensor, clock: Clock) -> dict[str, float]:
        """Milliseconds, medians over repeats."""
        first, token, layer, layer_token = [], [], [], []
        for _ in range(self.settings["repeats"]):
            dist.barrier()
            with clock.running() as seconds:
                start = time.perf_counter()
                cache = self.prefill(ids).past_key_values
                first.append(time.perf_counter() - start)
                layer += seconds
            with clock.running() as seconds:
                start = time.perf_counter()
                self.decode(ids, cache)
                token.append((time.perf_counter() - start) / self.steps)
                layer_token += seconds
        names = ("ttft", "tpot", "layer", "layer_decode")
        return {
            name: 1e3 * statistics.median(part)
            for name, part in zip(names, (first, token, layer, layer_token), strict=True)
        }

    def run(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        self.stock: Tensor | None = None
        for way in WAYS:
            if way.name == "classic" and self.folded:
                continue
            rates = self.settings["rates"]
            # What tries both ways does so over each link.
            for some in [[rate] for rate in rates] if way.trial else [rates]:
                for entry in self.served(way, some):
                    found.append(entry)
                    if self.here == 0:
                        print(json.dumps(entry), flush=True)
        return found

    def served(self, way: Way, rates: list[str | None]) -> Iterator[dict[str, Any]]:
        """One way over some links."""
        place = way.plan(self.plans)
        rank_of = self.split(place if way.split else None)
        mine = np.flatnonzero(rank_of == self.here)
        ids = self.requests[torch.from_numpy(mine)]
        with way.applied(self.model, place, self.folded) as layers:
            ours = self.settled(ids, way, rates[0])
            counts = every(self.counted(ids, layers) | {"requests": mine})
            logits = torch.empty(len(self.requests), counts[0]["logits"].shape[1])
            for part in counts:
                logits[torch.from_numpy(part["requests"])] = part["logits"]
            self.stock = logits if self.stock is None else self.stock
            off = float((logits - self.stock).abs().max() / self.stock.abs().max())
            clock = Clock(layers)
            taken = way if ours else WAYS[0]
            for rate in rates:
                with limited(self.here, rate):
                    times = every(self.timed(ids, clock))
                entry = {"model": self.name, "ranks": self.ranks, "link": rate or "loopback", "way": way.name}
                entry |= taken.summary(self, place, counts, times, len(layers)) | {"difference": off}
                yield entry | ({"kept": "ours" if ours else "stock"} if way.trial else {})

    def settled(self, ids: Tensor, way: Way, rate: str | None) -> bool:
        """Not timed: passes that are tried both ways, until it is decided; whether a prefill goes our way then."""
        with limited(self.here, rate):
            for _ in range(2 * (1 + way.trial) if way.trial else 0):
                self.decode(ids, self.prefill(ids).past_key_values)
            if not way.trial or self.folded:
                return True
            self.prefill(ids)
        trial = speculated(self.model)[0].forerun_state.trial
        return trial is None or trial.ours


@contextmanager
def limited(rank: int, rate: str | None) -> Iterator[None]:
    """Within, this rank's link has a rate; None: there is none."""
    dist.barrier()
    if rate is not None:
        limit(rank, rate)
    dist.barrier()
    yield
    dist.barrier()
    if rate is not None:
        limit(rank, None)


def every(mine: Any) -> list[Any]:
    """What each rank has."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def main(file: str, rank: int) -> None:
    settings = json.loads(Path(file).read_text())
    joined(settings, rank)
    found = []
    # The folded model last: DeepSpeed keeps its tensor-parallel groups, by which a classic layer would gather after it.
    for name in sorted(settings["models"], key=lambda name: name == "folded"):
        found += Serving(name, pinned(name, SHAPES[settings["shape"]]), settings).run()
    if rank == 0:
        Path(settings["out"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
