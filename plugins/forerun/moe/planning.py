"""A plan from a profile, layer by layer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from forerun.moe.dispatch import fan_out, rows
from forerun.moe.grouping import Grouping, contiguous, group
from forerun.moe.lookback import Lookback, dominant, fit_lookback, pairs_by_rank
from forerun.moe.plan import LayerReport, Plan
from forerun.moe.predict import Predictor, calibration, fit
from forerun.moe.profile import Profile, Table
from forerun.moe.shuffle import assign
from forerun.moe.task import Limits, Task, nearness

__all__ = ["make_plan"]

_OF_PATHS = ("batch", "calibration", "fan_out", "contiguous_fan_out", "sent", "contiguous_sent")
_BATCH = 512  # tokens that are shuffled together where the plan is tried on paths


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer as it is planned."""

    place: int  # in the model's MoE layers
    table: Table
    task: Task
    grouping: Grouping
    predictor: Predictor


def make_plan(
    profile: Profile,
    ranks: int,
    *,
    hosts: int = 1,
    near: float = 0.0,
    limits: Limits | None = None,
    effort: int | None = None,
    seed: int = 0,
    embeddings: NDArray[np.float32] | None = None,
    progress: Callable[[int], None] = lambda layer: None,
) -> Plan:
    """Groups every layer's experts and predicts every token id's ranks.

    Args:
        profile: Of the model's routing.
        ranks: R, which divide the experts.
        hosts: Of equally many ranks, next to each other.
        near: What a transfer inside a host saves of the cost of one between hosts, from 0 to below 1.
        limits: Of the ranks' loads; None: `Limits()`.
        effort: Descents a layer; None: about ten seconds of a core.
        seed: Of the search.
        embeddings: `[V, H]` the model's, by which ids that were never seen answer as their neighbour.
        progress: Is told the number of each layer that is done.

    Raises:
        ValueError: The ranks do not divide the experts, or the profile is empty.
    """
    identity = profile.identity
    near_by = nearness(ranks, hosts, near)
    limits = limits or Limits()
    tokens = np.unique(np.concatenate([profile.table(place).tokens for place in range(len(identity.layers))]))
    known = tokens if embeddings is None else np.arange(len(embeddings))
    rank, share, prior, ratio, reports = [], [], [], [], []
    sequence: list[NDArray[np.int64]] = []  # per layer, the ranks of the paths
    last_home: dict[str, NDArray[np.int64]] = {}
    for place, number in enumerate(identity.layers):
        table = profile.table(place)
        task = Task(table.counts, near_by, identity.top_k, limits)
        layer_seed = zlib.crc32(f"{seed} {number}".encode())
        grouping = group(task, effort=effort, seed=layer_seed)
        if hosts == 1:
            grouping = _named_alike(grouping, table, last_home, ranks)
        layer = _Layer(place, table, task, grouping, fit(table))
        lookback, report, at = _tried(profile, layer, sequence, number)
        sequence.append(at)
        member = np.eye(ranks, dtype=np.float32)[grouping.rank]
        rank.append(grouping.rank.astype(np.int16))
        share.append((layer.predictor.shares(known, embeddings) @ member).astype(np.float16))
        prior.append(layer.predictor.prior @ member)
        ratio.append(lookback)
        reports.append(report)
        progress(number)
    return Plan(
        identity,
        np.stack(rank),
        known,
        np.stack(share),
        np.stack(prior).astype(np.float32),
        np.stack([entry.ratio for entry in ratio]),
        np.array([entry.weight for entry in ratio], np.float32),
        tuple(reports),
    )


def _named_alike(grouping: Grouping, table: Table, last: dict[str, NDArray[np.int64]], ranks: int) -> Grouping:
    """The same groups, numbered so that as many tokens as possible have the last layer's rank; remembers this layer's.

    A request that stays on one rank for all layers, as in data parallelism, is near its experts in all of them then.
    """
    rating, weight = grouping.rating, table.counts.sum(1)
    if last:
        _, here, before = np.intersect1d(table.tokens, last["tokens"], return_indices=True)
        both = np.zeros((ranks, ranks))
        np.add.at(both, (rating.home[here], last["home"][before]), weight[here])
        _, name = linear_sum_assignment(-both)
        rating = rating._replace(home=name[rating.home])
        grouping = Grouping(name[grouping.rank], rating, grouping.exact, grouping.within_limits)
    last.update(tokens=table.tokens, home=rating.home)
    return grouping


def _tried(
    profile: Profile, layer: _Layer, sequence: list[NDArray[np.int64]], number: int
) -> tuple[Lookback, LayerReport, NDArray[np.int64]]:
    """The look-back, the report, and the paths' ranks: what the profile's paths say of a layer."""
    task, rank, rating = layer.task, layer.grouping.rank, layer.grouping.rating
    ranks = task.ranks
    plain = contiguous(task.experts, ranks)
    stock = task.rate(plain)
    experts = profile.paths.experts[:, layer.place]
    pairs = pairs_by_rank(experts, rank, ranks)
    lookback = Lookback(np.ones((ranks,) * 3, np.float32), 0.0)
    told: dict[str, float | None] = dict.fromkeys(_OF_PATHS)
    if len(experts):
        member = np.eye(ranks, dtype=np.float32)[rank]
        share = _left_out(layer, profile.paths.token, experts) @ member
        if layer.place >= 2:
            lookback = fit_lookback(share, sequence[-2], sequence[-1], pairs)
            share = lookback.adjusted(share, sequence[-2], sequence[-1])
        batches = [assign(torch.from_numpy(part)) for part in np.array_split(share, -(-len(share) // _BATCH))]
        home = torch.cat(batches).numpy()
        one = np.arange(len(home))
        sent = rows(experts, rank, home, ranks)
        random = np.random.default_rng(0).integers(ranks, size=len(home))
        told = {
            "batch": sent.local_rate,
            "calibration": calibration(share[one, home], pairs[one, home], np.full(len(home), experts.shape[1])).error,
            "fan_out": float(fan_out(experts, rank, ranks).mean()),
            "contiguous_fan_out": float(fan_out(experts, plain, ranks).mean()),
            "sent": sent.leaving() / len(home),
            "contiguous_sent": rows(experts, plain, random, ranks).leaving(deduplicated=False) / len(home),
        }
    report = LayerReport(
        layer=number,
        local=rating.local,
        contiguous=stock.local,
        saved=rating.saved,
        experts=rating.experts,
        contiguous_experts=stock.experts,
        tokens=rating.tokens,
        exact=layer.grouping.exact,
        lookback=lookback.weight,
        **told,
    )
    return lookback, report, dominant(pairs)


def _left_out(layer: _Layer, token: NDArray[np.int64], experts: NDArray[np.int16]) -> NDArray[np.float32]:
    """`[n, E]` what each path's id predicts from all its other occurrences."""
    row = np.searchsorted(layer.table.tokens, token)
    counts = layer.table.counts[row]
    np.subtract.at(counts, (np.arange(len(token))[:, None], experts), 1)
    return layer.predictor.smoothed(counts)
