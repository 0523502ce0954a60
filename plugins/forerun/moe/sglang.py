"""Speculative MoE in SGLang's expert parallelism: each token to a rank once, experts placed by a plan.

Turned on by the section `speculative_moe` of FORERUN_SGLANG, see `forerun.moe.sglang_config`, for a server that is
started as ever with `--tp R --ep R`. A layer's tokens are spread over the ranks between attention and experts, where
that is expected to take less than stock's two sums over all ranks, and is found to: `sglang_spread.py` is the way,
`choice.py` what is expected, `sglang_batches.py` has the trial. Experts are loaded where the plan has them, whatever
the way, and lie in order again if that is found to cost more than it saves (`imbalance.py`). `/server_info` tells what
each layer did and sent, under `internal_states[...].forerun.speculative_moe`.

Prefill, decode, radix cache and chunked prefill are stock's. The result is stock's but for roundings: products of
matrices have other numbers of rows, and sums another order.

Tested with Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V2. A shared expert, of SGLang's blocks of Qwen2-MoE or
DeepSeek, is a slice on each rank in stock, and answers whole where tokens are spread: each rank holds all of it besides
its slice from the start, and weights cannot be changed while such a model is served.

Not supported, refused with the reason: models that have neither SGLang's stage boundary nor its communicator, as OLMoE
(which SGLang itself cannot serve on more than one rank), Mixtral before 0.5.22, quantized experts, shared experts
before 0.5.23, of other blocks than those two, or among the routed ones, pipeline- and context-parallel servers, `--ep`
below `--tp`, an all-to-all backend other than `none`, redundant experts, EPLB. Inside of CUDA graphs stock's way is
taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.moe.agreement import agree
from forerun.moe.alternation import Alternation
from forerun.moe.choice import Choice, Rates, measure
from forerun.moe.dispatch import uniform_fan_out
from forerun.moe.exchange import exchanged
from forerun.moe.foresight import Foresight, even
from forerun.moe.identity import Identity
from forerun.moe.imbalance import ExpertTimes, Ledger
from forerun.moe.imbalance import measure as measure_experts
from forerun.moe.pieces import Pieces
from forerun.moe.plan import Plan
from forerun.moe.scatter import gather, scatter_sum
from forerun.moe.sglang_batches import Batches
from forerun.moe.sglang_config import Section
from forerun.moe.sglang_live import Watch, replace, steps
from forerun.moe.sglang_requests import Followed, Routes
from forerun.moe.sglang_spread import Ranks, Spread
from forerun_adapters import sglang_moe as host
from forerun_adapters import sglang_shared as shared
from forerun_adapters.sglang import RELEASE, Hook

__all__ = ["Speculation", "hooks"]

_log = logging.getLogger(__name__)


def hooks(section: Mapping[str, Any]) -> Sequence[Hook]:
    """What SGLang's functions are wrapped in, as the configuration asks.

    Raises:
        OSError: There is no such plan.
        ValueError: The section or the plan is not what it should be.
    """
    asked = Section.read(section)
    plan, followed, requests = None, None, []
    if asked.plan is not None:
        path = Path(asked.plan)
        plan = Plan.load(path)
        if asked.shuffle:
            followed = Followed()
            requests = host.routing(Routes(path, plan, followed).rank)
    speculation = Speculation(asked, plan, followed)
    return [
        Hook(host.LOADED, speculation.loaded),
        Hook(host.FORWARD, speculation.forward),
        Hook(host.STATE, speculation.told, "after"),
        *([] if plan is None else [Hook(host.LOCAL, speculation.local)]),
        *requests,
    ]


class Speculation:
    """What one process of a server knows: the layers that are spread, from when its model was loaded.

    Args:
        asked: The configuration.
        plan: Its plan.
        followed: Is told which plan is followed; None: nobody asks.
    """

    def __init__(self, asked: Section, plan: Plan | None, followed: Followed | None = None) -> None:
        self.asked, self.plan, self._followed = asked, plan, followed
        self.spread: dict[int, Spread] = {}  # by the layer's number in the model
        self._batches: Batches | None = None  # when its model was loaded
        self.rates: Rates | None = None
        self.times: ExpertTimes | None = None
        self._ledger: Ledger | None = None  # of the last plan that was followed
        self.moved = 0  # bytes of experts that left this rank
        self.laid_aside = False  # whether there was a plan that is of no use on this link, or to these requests
        self.whole = 0  # bytes of shared experts, held beside this rank's slices
        self._place = {} if plan is None else _places(plan)
        self._found: dict[int, Any] = {}  # SGLang's experts of each layer
        self._watch: Watch | None = None
        self._moving: Iterator[int] | None = None  # experts on their way back to their order

    def local(self, stock: Callable[..., int], experts: Any, expert: int) -> int:
        """Around SGLang's question which place of a rank an expert is loaded into."""
        place = self._place.get(experts.layer_id)
        routed = place is not None and not host.is_draft(experts) and 0 <= expert < len(place)
        return stock(experts, int(place[expert]) if place is not None and routed else expert)

    def loaded(self, stock: Callable[..., Any], runner: Any, *rest: Any, **named: Any) -> Any:
        """Around a model's loading.

        Raises:
            ValueError: The model or the server cannot be served, the plan is another's, or ranks were told different
                things.
        """
        result = stock(runner, *rest, **named)
        if runner.is_draft_worker:
            return result
        found = host.layers(runner.model)
        reason = self._misfit(runner, found, self.plan)
        if reason is not None and host.ranks() < 2:
            raise ValueError(f"forerun: {reason}")
        placement = "none" if self.plan is None else self.plan.digest
        agree(None if reason is None else f"forerun: {reason}", f"{placement} {self.asked}", host.group())
        self._install(found, next(runner.model.parameters()))
        if self.asked.watch and self.asked.plan is not None:
            path, misfit = Path(self.asked.plan), partial(self._misfit, runner, found)
            self._watch = Watch(path, self.asked.watch, self.taken, misfit)
        return result

    def forward(self, stock: Callable[..., Any], runner: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        """Around a model's forward pass."""
        if self._batches is None or runner.is_draft_worker:
            return stock(runner, batch, *rest, **named)
        forward = partial(stock, runner, batch, *rest, **named)
        return self._batches.run(*host.batch_of(batch), forward, host.each_of(batch))

    def taken(self, plan: Plan) -> None:
        """Moves experts to where another plan has them; all ranks call it between the same two batches."""
        assert self._batches is not None
        self._batches.trial = self._trial(self._batches.ranks)  # what was sooner by the old plan says nothing
        self._follow(plan)
        _log.info("forerun: there is another plan of %s", plan.identity)

    def told(self, result: Any, *_: Any) -> Any:
        """After SGLang's answer of its internal state."""
        layers = [{"layer": number, **asdict(one.counted)} for number, one in self.spread.items()]
        result.internal_state.setdefault("forerun", {})["speculative_moe"] = {
            "sglang": str(RELEASE),
            **asdict(self.asked),
            "model": None if self.plan is None else str(self.plan.identity),
            "ranks": host.ranks(),
            "rank": host.rank(),
            "expected_rows": {str(number): one.choice.expected for number, one in self.spread.items()},
            "rates": None if self.rates is None else asdict(self.rates),
            "trial": [] if self._batches is None or self._batches.trial is None else self._batches.trial.state(),
            "expert_times": None if self.times is None else asdict(self.times),
            "ledger": None if self._ledger is None else self._ledger.state(),
            "laid_aside": self.laid_aside,
            "moving": self._moving is not None,
            "in_pieces": self._batches is not None and self._batches.ranks.pieces.slow,
            "moved_bytes": self.moved,
            "shared_bytes": self.whole,
            "layers": layers,
        }
        return result

    def _misfit(self, runner: Any, found: Sequence[host.Found], plan: Plan | None) -> str | None:
        """Why this rank cannot do what it was told."""
        name = type(runner.model).__name__
        if not found:
            return f"{name} has no mixture-of-experts layer: take the section speculative_moe out"
        reason = host.server_obstacle()
        if reason is not None:
            return f"this server cannot be speculated: {reason}"
        for one in found:
            reason = host.obstacle(one)
            if reason is not None:
                return f"{one.name} of {name} cannot be speculated: {reason}"
        try:
            identity = _identity(runner, found)
            if plan is not None:
                plan.refuse_other(identity, host.ranks())
        except ValueError as error:
            return str(error)
        return None

    def _install(self, found: Sequence[host.Found], like: Tensor) -> None:
        nothing = Foresight(None, range(host.ranks()))
        pieces = Pieces(host.group())
        ranks = Ranks(host.group(), host.rank(), host.ranks(), self.asked.exact, host.apart(), nothing, pieces)
        width = int(found[0].experts.hidden_size)
        if self.asked.choose:
            self.rates = _measured(ranks, width, like)
            self.times = None if self.plan is None else _experts_measured(ranks, found[0].experts, width, like)
        for at, one in enumerate(found):
            place = self._place.get(one.number)
            place = None if place is None else place.to(like.device)
            spread = Spread(ranks, at, host.experts_of(one.experts), place, Choice(self.rates, 0.0))
            self.spread[one.number], self._found[one.number] = spread, one.experts
            one.experts.forerun_spread = spread
            one.experts.__class__ = host.experts_class(type(one.experts), _forward)
            host.attach(one.decoder, spread)
            if one.shared is not None:
                self.whole += shared.hold(one.shared, spread, host.group())
        self._batches = Batches(ranks, list(self.spread.values()), like.device, self._trial(ranks))
        self._batches.useless, self._batches.between = self._lay_aside, self._between
        self._follow(self.plan)
        _log.info("forerun: %d layers of sglang %s are speculated, %s", len(found), RELEASE, self.rates or "always")

    def _trial(self, ranks: Ranks) -> Alternation | None:
        tried = self.asked.choose and self.asked.trial
        return Alternation(self.asked.trial, ranks.group, "spread", "stock") if tried else None

    def _follow(self, plan: Plan | None) -> None:
        """Experts where a plan has them, if any batch should be sooner by it: so placed, small ones are slower."""
        self.plan, self.laid_aside = plan, False
        self._foresee()
        if plan is not None and self.rates is not None:
            rates, most = self.rates, host.most_tokens()
            if not any(rates.gains(most, most * one.choice.expected) for one in self.spread.values()):
                self._no_use("over this link SGLang's own sums take less for any batch")
        self._place_experts()

    def _lay_aside(self) -> None:
        """Between two batches: the plan saves less than it costs, by the batches that were counted."""
        assert self._batches is not None
        assert self._ledger is not None
        told = self._ledger.state()
        self._no_use(
            f"in {told['batches']} batches it saves {told['saved']:.3f} s on the wire, "
            f"and its ranks' imbalance costs {told['cost']:.3f} s"
        )
        self._batches.ledger = self._batches.trial = None
        self._moving = steps(self._found, self.spread, None)

    def _between(self) -> None:
        """A batch begins."""
        if self._watch is not None:
            self._watch()
        if self._moving is not None:
            left = next(self._moving, None)
            self._moved(left or 0)
            if left is None:  # what was sooner by the plan says nothing
                assert self._batches is not None
                self._moving, self._batches.trial = None, self._trial(self._batches.ranks)

    def _no_use(self, why: str) -> None:
        _log.warning("forerun: the plan is laid aside: %s", why)
        self.plan, self.laid_aside = None, True
        self._foresee()

    def _place_experts(self) -> None:
        """Experts where the plan has them, or in order, at once."""
        assert self._batches is not None
        ranks, self._batches.ledger, self._moving = self._batches.ranks, None, None
        self._moved(replace(self._found, self.spread, self.plan))
        if self.plan is not None and self.times is not None:
            place = torch.stack([one.place for one in self.spread.values() if one.place is not None])
            self._batches.ledger = self._ledger = Ledger(
                self.times, place, ranks.size, ranks.group, shown=self._batches.shown
            )

    def _moved(self, left: int) -> None:
        """So many bytes of experts left this rank; weights that are loaded from now on go where they lie."""
        self.moved += left
        places = {number: one.place for number, one in self.spread.items()}
        self._place = {number: place.cpu() for number, place in places.items() if place is not None}

    def _foresee(self) -> None:
        """What the plan says of tokens, to all layers, and to who routes requests."""
        assert self._batches is not None
        if self._followed is not None and host.rank() == 0:
            self._followed.tell(self.plan)
        ranks = self._batches.ranks
        size, shuffled = ranks.size, self.plan if self.asked.shuffle and not ranks.apart else None
        ranks.foresight = Foresight(shuffled, range(size))
        for number, one in self.spread.items():
            shape = one.experts, host.top_k_of(self._found[number]), size
            one.choice.expected = self._expected(self.plan, one.layer, *shape)
            one.choice.unplanned = self._expected(None, one.layer, *shape)

    def _expected(self, plan: Plan | None, at: int, experts: int, top_k: int, size: int) -> float:
        """Rows that a token is expected to send to other ranks, half of both ways together."""
        fan_out, local = uniform_fan_out(experts, size, top_k), 1 / size
        report = None if plan is None else plan.layers[at]
        if report is not None and report.fan_out is not None:
            fan_out = report.fan_out
        shuffled = self.asked.shuffle and report is not None
        if shuffled and report is not None:
            local = report.batch if report.batch is not None else report.local
        rows = fan_out * (1 - local)
        if shuffled and report is not None and report.sent is not None:
            rows = report.sent
        return (rows + top_k * (1 - local)) / 2 if self.asked.exact else rows


def _places(plan: Plan) -> dict[int, Tensor]:
    """`[E]` where each expert lies, by the layer's number."""
    order = torch.from_numpy(plan.order)
    return {number: order[at].argsort() for at, number in enumerate(plan.identity.layers)}


def _forward(experts: Any, stock: Callable[[Any], Any], hidden: Tensor, answer: Any) -> Any:
    spread: Spread = experts.forerun_spread
    if spread.under_way:
        return spread.answer(hidden, *host.routed(answer), partial(host.computed, experts))
    if spread.ranks.counting:
        spread.saw(host.routed(answer)[1])
    return stock(answer if spread.place is None else host.placed(answer, spread.place))


def _identity(runner: Any, found: Sequence[host.Found]) -> Identity:
    shapes = {(host.experts_of(one.experts), host.top_k_of(one.experts)) for one in found}
    if len(shapes) != 1:
        raise ValueError(f"{type(runner.model).__name__} has layers of different (experts, top k): {sorted(shapes)}")
    return Identity(host.name_of(runner), tuple(one.number for one in found), *shapes.pop())


def _measured(ranks: Ranks, width: int, like: Tensor) -> Rates:
    """What the collectives of a layer take, rows as wide as the model's."""

    def rows(tokens: int) -> Tensor:
        return torch.zeros(tokens, width, dtype=like.dtype, device=like.device)

    def summed(tokens: int) -> None:
        for _ in range(2):
            host.all_reduce(rows(tokens))

    def spread(tokens: int, sent: int) -> None:
        there = even(tokens, ranks.size)
        if not ranks.apart:
            mine = scatter_sum(rows(tokens), there, ranks.group, ranks.pieces)
            gather(mine, there, ranks.group, ranks.pieces)
        each = [sent // (ranks.size - 1)] * ranks.size
        each[ranks.rank] = 0
        told = torch.tensor(each, device=like.device)
        exchanged(told, [1] * ranks.size, [1] * ranks.size, ranks.group).tolist()
        for _ in range(2):
            exchanged(rows(sum(each)), each, each, ranks.group)

    return measure(summed, spread, ranks.group, wait=_waiting(like))


def _experts_measured(ranks: Ranks, experts: Any, width: int, like: Tensor) -> ExpertTimes:
    """What the experts of a layer take, as they lie now."""
    each = host.experts_of(experts) // ranks.size
    every = torch.arange(each, device=like.device)

    def compute(rows: int) -> None:
        number = every.repeat_interleave(rows)
        host.computed(experts, torch.zeros(len(number), width, dtype=like.dtype, device=like.device), number)

    return measure_experts(compute, each, ranks.group, wait=_waiting(like))


def _waiting(like: Tensor) -> Callable[[], None]:
    return torch.cuda.synchronize if like.device.type == "cuda" else lambda: None
