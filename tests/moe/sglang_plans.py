"""Plans of small models for SGLang's environment, and the bytes that a batch sends by one, told without SGLang."""

import numpy as np
import torch

from forerun.moe.dispatch import fan_out, rows
from forerun.moe.foresight import Foresight
from forerun.moe.lookback import Lookback, dominant, fit_lookback, pairs_by_rank
from forerun.moe.plan import LayerReport, Plan
from forerun.moe.predict import fit
from forerun.moe.transformers import profile_model
from forerun_adapters import transformers as host


def plan_of(model, pieces, ranks, seed=0, uneven=False):
    """Experts drawn onto ranks, their tokens foreseen from the model's routing of the pieces; with a look-back.

    Args:
        uneven: Those that are asked most are together, as no real plan has them.
    """
    profile = profile_model(model, [torch.tensor(piece) for piece in pieces])
    identity, draw = profile.identity, np.random.default_rng(seed)
    tokens = np.arange(model.config.vocab_size)
    placed, shares, priors, lookbacks, reports, sequence = [], [], [], [], [], []
    for place, number in enumerate(identity.layers):
        table = profile.table(place)
        rank = draw.permutation(np.arange(identity.experts) % ranks)
        if uneven:
            rank[np.argsort(-table.counts.sum(0))] = np.sort(rank)
        member, predictor = np.eye(ranks, dtype=np.float32)[rank], fit(table)
        share = (predictor.shares(tokens, None) @ member).astype(np.float16)
        experts = profile.paths.experts[:, place]
        pairs = pairs_by_rank(experts, rank, ranks)
        lookback = Lookback(np.ones((ranks,) * 3, np.float32), 0.0)
        if place >= 2:
            lookback = fit_lookback(share[profile.paths.token].astype(np.float32), sequence[-2], sequence[-1], pairs)
            lookback = Lookback(lookback.ratio, 0.5)  # so that it is used, worth it or not
        sequence.append(dominant(pairs))
        told = dict.fromkeys(("batch", "calibration", "contiguous_fan_out", "sent", "contiguous_sent"))
        report = dict.fromkeys(
            ("local", "contiguous", "saved", "experts", "contiguous_experts", "tokens", "lookback"), 1.0
        )
        fan = float(fan_out(experts, rank, ranks).mean())
        reports.append(LayerReport(layer=number, exact=False, fan_out=fan, **told, **report))
        placed.append(rank.astype(np.int16))
        shares.append(share)
        priors.append(predictor.prior @ member)
        lookbacks.append(lookback)
    return Plan(
        identity,
        np.stack(placed),
        tokens,
        np.stack(shares),
        np.stack(priors).astype(np.float32),
        np.stack([one.ratio for one in lookbacks]),
        np.array([one.weight for one in lookbacks], np.float32),
        tuple(reports),
    )


def routing(model, prompt):
    """`[L, n, k]` the experts of a prompt's tokens."""
    found = host.routers(model)
    with host.watched(found) as chosen, torch.no_grad():
        model(torch.tensor([prompt]), use_cache=False)
        return torch.stack([chosen[router.layer] for router in found]).numpy()


def sent(model, plan, prompt, rank, *, notes):
    """Of a batch of this prompt alone, layer by layer, in fast mode: rows and bytes that a rank sends; the pairs of its
    tokens and their experts, and those of them whose expert it has.

    Args:
        notes: Numbers that travel with each token when all come together.
    """
    chosen, ranks, width = routing(model, prompt), plan.ranks, model.config.hidden_size * 4
    each = plan.identity.experts // ranks
    foresight, told = Foresight(plan, range(ranks)), []
    foresight.begin(torch.tensor(prompt))
    for place, experts in enumerate(chosen):
        there = foresight.shuffle(place, len(prompt))
        home = np.empty(len(prompt), np.int64)
        home[there.order.numpy()] = np.repeat(np.arange(ranks), there.sizes)
        between = rows(experts, plan.rank[place], home, ranks).deduplicated
        if foresight.looks_back:
            pairs = pairs_by_rank(experts.astype(np.int16), plan.rank[place].astype(np.int64), ranks)
            foresight.saw(torch.from_numpy(dominant(pairs)))
        leaving = int(between[rank].sum() - between[rank, rank])
        answered = int(between[:, rank].sum() - between[rank, rank])
        total = (len(prompt) - there.sizes[rank]) * width  # half of the sum
        total += (ranks - 1) * max(there.sizes) * (width + 4 * notes)  # all tokens again
        total += 8 * (ranks - 1) + leaving * (width + -(-4 * each // 8) * 8) + answered * width
        mine = plan.rank[place][experts[home == rank]]
        told.append((leaving, total, mine.size, int((mine == rank).sum())))
    return told
