"""The hooks of one scheduler on a pipeline's denoisers: put on, put back, taken off."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from forerun.picard.consistency import Consistency
from forerun.picard.denoiser import Asked, Denoiser, Family, Sweep
from forerun.picard.ranks import PointRanks
from forerun_adapters import diffusers as host

__all__ = ["Binding"]

_HOOK = "forerun.picard"


class Binding:
    """Denoisers whose calls a scheduler widens. Empty: the pipeline itself is fed the window.

    Args:
        modules: The denoisers, each with how it takes its arguments. Hooked; those of an earlier scheduler give way.
        sweep: What is being asked at the moment of a call; None for a call that is to stay as it is.
        max_points: Most points in one call.
        ranks: Over which a sweep's points are split.
        pipe: The pipeline they belong to; None for a bare loop.
        consistency: The Picard Consistency Model of one of them: of the component that it names, or the only one.

    Raises:
        ValueError: The Picard Consistency Model is another model's; nothing is hooked then.
    """

    def __init__(
        self,
        modules: Iterable[tuple[nn.Module, Family]] = (),
        *,
        sweep: Callable[[], Sweep | None] = lambda: None,
        max_points: int | None = None,
        ranks: PointRanks | None = None,
        pipe: Any = None,
        consistency: Consistency | None = None,
    ) -> None:
        modules = list(modules)
        guided = None if consistency is None else _guided(consistency, [module for module, _ in modules], pipe)
        self.ranks = ranks
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._bound: list[tuple[weakref.ref[nn.Module], Denoiser]] = []
        for module, family in modules:
            denoiser = Denoiser(
                name=host.family_name(module),
                signature=host.forward_signature(module),
                family=family,
                sweep=sweep,
                max_points=max_points,
                ranks=ranks,
            )
            host.unhook_forward(module, _HOOK)
            if consistency is not None and module is guided:
                denoiser.change = consistency.change.on(module)
            host.hook_forward(module, _HOOK, denoiser)
            self._bound.append((weakref.ref(module), denoiser))

    def tap(self, told: Callable[[Asked], None] | None) -> None:
        """Tells `told` of everything that sweeps ask the denoisers; None: no longer."""
        for _, denoiser in self._bound:
            denoiser.tap = told

    def __bool__(self) -> bool:
        return bool(self._bound)

    def begin_run(self) -> None:
        """Before a loop: puts back hooks that offloading, or another pipeline's scheduler, has displaced."""
        for module, denoiser in self._modules():
            if not host.is_hooked_last(module, _HOOK, denoiser):
                host.unhook_forward(module, _HOOK)
                host.hook_forward(module, _HOOK, denoiser)
            denoiser.begin_run()

    def end_run(self) -> None:
        """After a loop: lets go of its conditioning."""
        for _, denoiser in self._bound:
            denoiser.end_run()

    def undo(self) -> None:
        """Takes the hooks off."""
        for module, denoiser in self._modules():
            if host.is_hooked(module, _HOOK, denoiser):  # not where another scheduler's has taken its place
                host.unhook_forward(module, _HOOK)
        self._bound.clear()

    def running_pipeline(self) -> Any | None:
        """The bound pipeline while it runs; None otherwise."""
        pipe = None if self._pipe is None else self._pipe()
        return pipe if pipe is not None and host.pipeline_arguments(pipe) is not None else None

    def _modules(self) -> Iterator[tuple[nn.Module, Denoiser]]:
        for reference, denoiser in self._bound:
            module = reference()
            if module is not None:
                yield module, denoiser


def _guided(consistency: Consistency, modules: Sequence[nn.Module], pipe: Any) -> nn.Module:
    """The denoiser that a Picard Consistency Model belongs to."""
    component = consistency.card.component
    names = {module: component if pipe is None else host.component_name(pipe, module) for module in modules}
    found = next((module for module, name in names.items() if name == component), None)
    if found is None:
        raise ValueError(
            f"this Picard Consistency Model changes a {component}, and the pipeline has "
            f"{', '.join(names.values())}: it was trained for another pipeline"
        )
    consistency.check(found, host.model_name(found))
    return found
