"""Speculative MoE on DeepSpeed's expert-parallel layers, in place: `speculate(model, plan)`, `unspeculate(model)`.

Replaces the forward pass of AutoEP's layers and of classic `deepspeed.moe` ones in inference: a token's hidden state
goes to each rank once, not once per expert, and with a plan the experts lie where it says. Router, experts and sum stay
stock's, so with `exact=True` the result is stock's bit for bit: every expert sees the same rows in the same order.

    deepspeed_autoep.py, deepspeed_classic.py   the two kinds of layers
    deepspeed_state.py       what a layer carries, and where its experts lie
    background.py            experts moved while the model serves
    deepspeed_checkpoint.py  checkpoints in stock's layout, whatever the plan
    deepspeed_counts.py      a profile that goes on while the model serves
    deepspeed_shuffle.py     tokens shuffled around tensor-parallel attention
    deepspeed_trial.py       stock's way where that is sooner
    deepspeed_config.py      all of it by a section of DeepSpeed's configuration

`register()`, or `python -m forerun.moe.deepspeed script.py …` with the script unchanged, makes `deepspeed.initialize`
and `init_inference` read that section.

Not supported: training (without a plan, the stock forward pass runs under gradients; with one, that is an error),
ZeRO stage 3, DeepEP, Tutel, tensor parallelism of classic layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from forerun.moe.agreement import agree
from forerun.moe.deepspeed_autoep import SpeculativeAutoEP
from forerun.moe.deepspeed_checkpoint import keep_stock_layout, leave_layout
from forerun.moe.deepspeed_classic import SpeculativeClassic
from forerun.moe.deepspeed_counts import Counter
from forerun.moe.deepspeed_shuffle import folded, obstacle, shuffle_tokens, unshuffle_tokens
from forerun.moe.deepspeed_state import State, lay, lay_beside, refuse_torn, speculated, stop_moving
from forerun.moe.deepspeed_trial import Trial
from forerun.moe.identity import Identity
from forerun.moe.plan import Plan
from forerun.moe.profile import Profile
from forerun_adapters import deepspeed as host

__all__ = [
    "apply",
    "counts",
    "identify",
    "moving",
    "register",
    "sent_rows",
    "speculate",
    "unregister",
    "unspeculate",
]


def speculate(
    model: Any,
    plan: Plan | None = None,
    *,
    exact: bool = True,
    shuffle: bool = True,
    count: bool = False,
    trial: int = 0,
) -> None:
    """Makes a model's expert-parallel layers send each token to a rank once, its experts placed by a plan.

    All ranks call it alike; it is undone by `unspeculate`.

    Args:
        model: The model, or DeepSpeed's engine around it.
        plan: Where experts lie; None: where they are.
        exact: A row per (token, expert) comes back and stock's own sum is taken: bit for bit stock's result. False: a
            sum per rank comes back, fewer bytes; see `forerun.moe.overlap.summed` for how far that may be off.
        shuffle: Where attention is tensor-parallel: a token goes to the rank that the plan expects its experts on;
            False: tokens are split in their order. See `forerun.moe.deepspeed_shuffle`.
        count: Goes on with a routing profile while the model runs: see `counts`.
        trial: Passes of each size (to a power of two, of the rank with most tokens) that go our way and as many that
            go stock's, by turns, before all ranks keep the way that takes less time, and say so where it is stock's;
            it is tried again after many passes. 0: all go ours. Where attention is tensor-parallel it is the shuffle
            that is tried. `count` is not for such models.

    Raises:
        ValueError: The model has no expert-parallel layer, one of settings that only stock serves, is speculated
            already; the plan is of another model or number of ranks; or ranks were told different things. Nothing was
            changed.
    """
    module = getattr(model, "module", model)
    found = host.layers(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no expert-parallel layer: build it with deepspeed.moe.layer.MoE, or "
            "deepspeed.initialize it with expert_parallel"
        )
    for _, name, layer in found:
        if hasattr(layer, "forerun_state"):
            raise ValueError(f"{name} is speculated already: apply(model, plan) another plan, or unspeculate(model)")
        reason = host.obstacle(layer) or obstacle(module, name, layer) or _partial(layer, count)
        if reason is not None:
            raise ValueError(f"{name} cannot be speculated: {reason}")
    group = found[0].layer.ep_group
    agree(_misfit(module, plan, counted=count), _told(plan, exact, shuffle, count, trial), group)
    counter = Counter(identify(module), dist.get_rank()) if count else None
    for index, (_, name, layer) in enumerate(found):
        layer.forerun_state = State(name, type(layer), exact, index, shuffle=shuffle, counter=counter)
        keep_stock_layout(layer)
        layer.__class__ = SpeculativeAutoEP if isinstance(layer, host.AutoEPLayer) else SpeculativeClassic
    if counter is not None:
        found[0].layer.forerun_state.hooks += counter.hooks(module)
    _place(module, plan)
    _shuffle(module, plan, trial)
    _try(module, trial)


def apply(model: Any, plan: Plan | None, *, background: bool = False, trial: int = 0) -> None:
    """Moves a speculated model's experts to where another plan has them, while it goes on serving.

    All ranks call it alike, between the same two forward passes. Results stay stock's at every point. What moves at
    once are pieces of `forerun.moe.move.MOVE_BYTES` bytes on each rank, whatever the model's size. A move that is
    under way ends here, its experts where they have come to, and is forgotten: `apply(model, plan)` of the same plan
    moves the rest at once.

    Args:
        model: The model, or the engine around it.
        plan: Where experts shall lie; None: where stock has them.
        background: Pieces travel while forward passes go on, the next one's turn coming with the next call of a layer,
            and experts are put in their places some at a time: see `forerun.moe.background` for what a rank holds
            meanwhile, and `moving` for what is left. Nothing moves while no pass runs. False: all now.
        trial: As of `speculate`; it begins when experts lie there, but that of shuffled tokens at once.

    Raises:
        ValueError: The model is not speculated, the plan is another model's, or ranks were told different things.
            Nothing was changed.
        RuntimeError: A rank was lost while experts moved; in the background, the forward pass raises it.
    """
    module = getattr(model, "module", model)
    layers = speculated(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} is not speculated: speculate(model, plan) first")
    for layer in layers:
        refuse_torn(layer)
    agree(_misfit(module, plan), _told(plan, background, trial), layers[0].ep_group)
    stop_moving(layers)
    _shuffle(module, plan, trial)
    _try(module, 0)
    if not background:
        _place(module, plan)
        _try(module, trial)
        return

    def done() -> None:
        if not moving(module):
            _try(module, trial)

    lay_beside(layers, _orders(module, plan), done)


def moving(model: Any) -> int:
    """Layers whose experts are not yet all where `apply(model, plan, background=True)` moves them; 0: nothing moves."""
    layers = speculated(getattr(model, "module", model))
    moves = {layer.forerun_state.move for layer in layers} - {None}
    return sum(move.left() for move in moves)


@torch.no_grad()
def unspeculate(model: Any) -> None:
    """Leaves the model as it was: stock layers, experts where they were, bit for bit. All ranks call it.

    Raises:
        RuntimeError: A rank was lost while experts moved, now or before.
    """
    module = getattr(model, "module", model)
    layers = speculated(module)
    for layer in layers:
        refuse_torn(layer)
    stop_moving(layers)
    unshuffle_tokens(module)
    for layer in layers:
        lay(layer, None)
    for layer in layers:
        leave_layout(layer)
        layer.__class__ = layer.forerun_state.stock
        del layer.forerun_state


def sent_rows(model: Any) -> int:
    """Rows that this rank sent on their way to experts since `speculate`, where it was not stock's way."""
    return sum(layer.forerun_state.sent for layer in speculated(getattr(model, "module", model)))


def counts(model: Any) -> Profile:
    """What this rank's tokens took since `speculate(model, count=True)`, to be saved or merged with other ranks'.

    Raises:
        ValueError: The model does not count.
    """
    module = getattr(model, "module", model)
    counter: Counter | None = next((layer.forerun_state.counter for layer in speculated(module)), None)
    if counter is None:
        raise ValueError(f"{type(module).__name__} does not count: speculate(model, plan, count=True)")
    return counter.profile()


def identify(model: Any) -> Identity:
    """Which model this is, as profiles and plans name it.

    Raises:
        ValueError: Its layers differ in experts or top k.
    """
    module = getattr(model, "module", model)
    found = host.layers(module)
    shapes = {(host.experts_of(entry.layer), host.top_k_of(entry.layer)) for entry in found}
    if len(shapes) != 1:
        raise ValueError(f"{type(module).__name__} has layers of different (experts, top k): {sorted(shapes)}")
    return Identity(host.name_of(module), tuple(entry.number for entry in found), *shapes.pop())


def register() -> None:
    """Makes `deepspeed.initialize` and `init_inference` read the section: see `forerun.moe.deepspeed_config`."""
    from forerun.moe.deepspeed_config import register

    register()


def unregister() -> None:
    """Takes `register` back."""
    from forerun.moe.deepspeed_config import unregister

    unregister()


def _misfit(module: Any, plan: Plan | None, *, counted: bool = False) -> str | None:
    """Why this rank cannot take the plan."""
    if plan is None and not counted:
        return None
    try:
        identity = identify(module)
        if plan is not None:
            plan.refuse_other(identity, host.layers(module)[0].layer.ep_size)
    except ValueError as error:
        return str(error)
    return None


def _partial(layer: Any, count: bool) -> str | None:
    """Why a layer that sees but a part of the tokens is not asked for this."""
    if not count or not folded(layer):
        return None
    return (
        "where attention is tensor-parallel a layer is given a part of the tokens: no count (count=False; profile the "
        "model beforehand)"
    )


def _told(plan: Plan | None, *options: Any) -> str:
    return f"{plan and plan.digest} {options}"


def _orders(module: Any, plan: Plan | None) -> list[torch.Tensor | None]:
    """Of each layer, the expert at each place; None: stock's."""
    return [None if plan is None else torch.from_numpy(plan.order[index]) for index in range(len(speculated(module)))]


def _place(module: Any, plan: Plan | None) -> None:
    for layer, order in zip(speculated(module), _orders(module, plan), strict=True):
        lay(layer, order)


def _shuffle(module: Any, plan: Plan | None, trial: int) -> None:
    unshuffle_tokens(module)
    layers = speculated(module)
    found = [(layer.forerun_state.name, layer) for layer in layers]
    looked_at = shuffle_tokens(module, found, plan if layers[0].forerun_state.shuffle else None, trial)
    for layer in layers:
        layer.forerun_state.looked_at = looked_at


def _try(module: Any, turns: int) -> None:
    layers = [layer for layer in speculated(module) if not folded(layer)]
    trial = Trial(layers, turns) if turns and layers else None
    for layer in layers:
        layer.forerun_state.trial = trial


if __name__ == "__main__":
    from forerun.moe.deepspeed_config import main

    main()
