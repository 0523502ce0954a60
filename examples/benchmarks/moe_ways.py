"""The ways that a model is served: DeepSpeed's own two, ours part by part, and experts placed by load alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from moe_models import as_classic
from numpy.typing import NDArray
from torch import Tensor, nn

from forerun.moe.balance import balance
from forerun.moe.deepspeed import speculate, unspeculate
from forerun.moe.dispatch import rows
from forerun.moe.grouping import contiguous
from forerun.moe.identity import Identity
from forerun.moe.plan import LayerReport, Plan
from forerun.moe.planning import make_plan
from forerun.moe.predict import fit
from forerun.moe.profile import Profile, Recorder
from forerun_adapters import deepspeed as host

__all__ = ["WAYS", "Plans", "Routing", "Way", "plans_of"]


@dataclass(frozen=True)
class Plans:
    """Of one model: experts grouped by their tokens, in their order, and by load alone (EPLB without copies)."""

    grouped: Plan
    in_order: Plan
    by_load: Plan


class Routing:
    """Within, what AutoEP's routers choose: `experts`, `[n, k]` a layer; classic layers have none and say nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.experts: list[NDArray[np.int64]] = []
        self._routers = [layer.router for _, _, layer in host.layers(model) if hasattr(layer, "router")]
        self._hooks: list[Any] = []

    def __enter__(self) -> Routing:
        keep = lambda _module, _inputs, output: self.experts.append(output[1].numpy().copy())  # noqa: E731
        self._hooks = [router.register_forward_hook(keep) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def plans_of(model: Any, batches: Sequence[Tensor], effort: int, folded: bool) -> Plans:
    """Plans from what the model's routers choose on these batches (`[ranks * n, length]` each), rank 0's for all."""
    found = host.layers(model)
    layer = found[0][2]
    identity = Identity(host.name_of(model), tuple(n for n, _, _ in found), layer.num_experts, layer.top_k)
    recorder, ranks = Recorder(identity), dist.get_world_size()
    for batch in batches:
        mine = batch if folded else batch.chunk(ranks)[dist.get_rank()]
        with Routing(model) as routing:
            model(mine, use_cache=False)
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, (mine.flatten().numpy(), np.stack(routing.experts)))
        for ids, experts in parts[:1] if folded else parts:
            recorder.add(ids, experts)
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        profile = recorder.profile()
        loads = [profile.table(place).counts.sum(0) for place in range(len(found))]
        packed = np.zeros((len(found), layer.num_experts), np.int64)
        for place, load in enumerate(loads):
            packed[place, balance(load, ranks, layer.num_experts // ranks).expert] = np.arange(ranks)[:, None]
        plain = np.tile(contiguous(layer.num_experts, ranks), (len(found), 1))
        told = [Plans(make_plan(profile, ranks, effort=effort), _placed(profile, plain), _placed(profile, packed))]
    dist.broadcast_object_list(told, src=0)
    plans: Plans = told[0]
    return plans


def _placed(profile: Profile, rank: NDArray[np.int64]) -> Plan:
    """A plan with experts where they are said to be, without look-back."""
    layers, ranks = len(rank), int(rank.max()) + 1
    tables = [profile.table(place) for place in range(layers)]
    tokens = np.unique(np.concatenate([table.tokens for table in tables]))
    member = np.eye(ranks, dtype=np.float32)[rank]
    predictors = [fit(table) for table in tables]
    share = np.stack([one.shares(tokens) @ at for one, at in zip(predictors, member, strict=True)])
    prior = np.stack([one.prior @ at for one, at in zip(predictors, member, strict=True)])
    nothing = {field.name: 0.0 for field in fields(LayerReport)} | {"exact": False}
    return Plan(
        profile.identity,
        rank.astype(np.int16),
        tokens,
        share.astype(np.float16),
        prior.astype(np.float32),
        np.ones((layers, ranks, ranks, ranks), np.float32),
        np.zeros(layers, np.float32),
        tuple(LayerReport(**{**nothing, "layer": number}) for number in profile.identity.layers),
    )


@dataclass(frozen=True)
class Way:
    """One row of the benchmark."""

    name: str
    plan: Callable[[Plans], Plan | None] = lambda plans: None  # where experts lie; None: in their order
    split: bool = False  # whether requests are assigned by the plan
    ours: bool = True
    exact: bool = False
    trial: int = 0  # passes of each size by each way before the sooner one is kept

    @contextmanager
    def applied(self, model: Any, plan: Plan | None, folded: bool) -> Iterator[list[nn.Module]]:
        """Within, the model is served this way; its MoE layers, or where tokens are shuffled the decoder layers."""
        decoders = [model.get_submodule(name.rpartition(".")[0]) for _, name, _ in host.layers(model)]
        stock = [decoder.mlp for decoder in decoders]
        try:
            if self.name == "classic":
                for decoder in decoders:
                    decoder.mlp = as_classic(decoder.mlp)
            elif self.ours:
                speculate(model, plan, exact=self.exact, shuffle=self.split, trial=self.trial)
            yield decoders if folded else [decoder.mlp for decoder in decoders]
        finally:
            for decoder, layer in zip(decoders, stock, strict=True):
                decoder.mlp = layer
            unspeculate(model)

    def expected(
        self, plan: Plan | None, experts: list[NDArray[np.int64]], place: int, count: int, capacity: int
    ) -> int:
        """Bytes of hidden states, in rows, that all ranks send in a layer, there and back, by `forerun.moe.dispatch`.

        Args:
            plan: Where experts lie.
            experts: `[n, k]` of each rank's tokens.
            place: The layer's.
            count: E.
            capacity: Rows of each expert that the classic layer sends.
        """
        ranks = len(experts)
        rank = contiguous(count, ranks) if plan is None else plan.rank[place]
        home = np.repeat(np.arange(ranks), [len(part) for part in experts])
        sent = rows(np.concatenate(experts), np.asarray(rank, np.int64), home, ranks)
        if self.name == "classic":
            return 2 * count * capacity * (ranks - 1)
        if self.ours:
            return sent.leaving() + sent.leaving(deduplicated=not self.exact)
        return 2 * sent.leaving(deduplicated=False)

    def summary(
        self, serving: Any, plan: Plan | None, counts: list[Any], times: list[Any], layers: int
    ) -> dict[str, Any]:
        """What all ranks measured, as one entry; bytes of a layer are all ranks', milliseconds the slowest rank's."""
        width, experts = serving.model.config.hidden_size * 4, serving.plans.grouped.identity.experts
        if (
            self.name != "classic"
        ):  # whose routers are not AutoEP's: its load is that of the way before, of the same split
            serving.routed = [part["experts"] for part in counts]
        routed = serving.routed
        each = [[part[place] for part in routed] for place in range(layers)]
        formula = sum(
            self.expected(plan, parts, place, experts, max(part["most"][place] for part in counts))
            for place, parts in enumerate(each)
        )
        formula *= width
        if serving.folded:  # an all-reduce in two halves; stock's partition and gathering are not put in a formula
            tokens, ranks = serving.requests.shape[0] * serving.length, serving.ranks
            formula += layers * (ranks - 1) * (tokens + -(-tokens // ranks) * ranks) * width
        rank = np.stack([contiguous(experts, serving.ranks)] * layers) if plan is None else plan.rank
        load = [
            np.bincount(rank[place][np.concatenate(parts).ravel()], minlength=serving.ranks)
            for place, parts in enumerate(each)
        ]
        sent = [sum(part["prefill"]["rows"].values()) for part in counts]
        index = [part["prefill"]["index"] for part in counts]
        return {
            "row_bytes": sum(sent) / layers,
            "row_bytes_formula": formula / layers if self.ours or not serving.folded else None,
            "index_bytes": sum(index) / layers,
            "busiest_bytes": max(a + b for a, b in zip(sent, index, strict=True)) / layers,
            "collectives": counts[0]["prefill"]["calls"],
            "decode_bytes": sum(part["decode"]["rows"] + part["decode"]["index"] for part in counts) / layers,
            "expert_load": float(np.mean([one.max() / one.mean() for one in load])),
            **{name: max(part[name] for part in times) for name in times[0]},
        }


# Stock AutoEP comes first: what the others are held against.
WAYS = (
    Way("autoep", ours=False),
    Way("classic", ours=False),
    Way("exact", exact=True),
    Way("dispatcher"),
    Way("by load", lambda plans: plans.by_load),
    Way("s-EG", lambda plans: plans.grouped),
    Way("s-TS", lambda plans: plans.in_order, split=True),
    Way("both", lambda plans: plans.grouped, split=True),
    Way("as turned on", lambda plans: plans.grouped, split=True, trial=8),
)
