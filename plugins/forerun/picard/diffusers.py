"""`PicardScheduler`: parallel-in-time sampling for diffusers pipelines, in one line.

    pipe.scheduler = PicardScheduler.from_pipe(pipe)

Replaces: a pipeline's scheduler, by one that is also an instance of its class. The pipeline's own loop over
`scheduler.timesteps` becomes the sweep loop (its iteration ends when the trajectory has converged), its calls of the
denoiser are widened to all points of the window by a diffusers `ModelHook`, and `scheduler.step` rebuilds the
trajectory with the base scheduler's own `step`.

Where diffusers calls it: `set_timesteps`, `timesteps`, `scale_model_input` and `step`, from a pipeline's `__call__`.

Not supported, and refused by name: base schedulers that are not in `SERVED`, denoisers that `rules.py` does not know,
pipelines that edit latents between steps, arguments that make the loop compute from its counter or timestep.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn
from torch import distributed as dist

from forerun.picard import rules
from forerun.picard.consistency import Consistency
from forerun.picard.denoiser import Asked, Family
from forerun.picard.diffusers_hooks import Binding
from forerun.picard.levels import DATA_VARIANCE
from forerun.picard.options import Options
from forerun.picard.ranks import PointRanks
from forerun.picard.report import Report
from forerun.picard.run import Memory, Run, Setting
from forerun.picard.switch import Switch
from forerun.picard.timesteps import SweepTimesteps
from forerun_adapters import diffusers as host

__all__ = ["SERVED", "PicardScheduler", "parallel"]

# Base schedulers whose sequential result is reproduced; each is tested at tolerance 0.
SERVED = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

_OPTIONS_KEY = "_picard"  # in the config; diffusers keeps keys with an underscore to itself when classes are swapped
_UNCONDITIONAL = ("DDIMPipeline", "DDPMPipeline")


SchedulerMixin = host.SchedulerMixin  # diffusers looks for it beside a class that a saved pipeline names


class PicardScheduler:
    """Samples in parallel over time behind an unmodified pipeline.

    Never made directly: `from_pipe`, `from_config` and `from_pretrained` return an instance of a class that is made for
    the base scheduler and inherits from it, such as `PicardDDIMScheduler`.

    Sequential equivalent, and the result at `tolerance=0`: the same pipeline with the base scheduler.

    Source: Parallel Sampling of Diffusion Models, arXiv 2305.16317, algorithm 1.
    """

    _base_class: type[Any]
    timesteps: Tensor
    config: Any  # the base scheduler's

    # What an instance holds until `_choose`: some base schedulers set timesteps while they are made.
    _picard_options = Options()
    _picard_memory = Memory()
    _picard_run: Run | None = None
    _picard_binding = Binding()
    _picard_switch: Switch | None = None
    _picard_data_variance = DATA_VARIANCE  # where the options leave it open
    _picard_warned = False

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        *,
        unbatched: tuple[str, ...] | None = None,
        group: dist.ProcessGroup | None = None,
        distributed: bool = False,
        timeout: float = 60.0,
        pcm: Consistency | str | os.PathLike[str] | None = None,
        switch: Switch | str = "auto",
        **options: Any,
    ) -> PicardScheduler:
        """A scheduler like the pipeline's own that samples in parallel: `pipe.scheduler = …from_pipe(pipe)`.

        Hooks the pipeline's denoisers; assigns nothing. `detach()` undoes it.

        Args:
            pipe: A diffusers pipeline.
            unbatched: Arguments of a denoiser that forerun does not know whose tensors have no batch axis.
            group: Splits every window over the ranks of this process group; all ranks run the same program.
            distributed: Splits over the default process group.
            timeout: Seconds that one exchange between ranks may take.
            pcm: A Picard Consistency Model of the pipeline's denoiser, or the folder of one. The result stays the base
                model's own, whatever it answers.
            switch: Which points it answers: "auto" (where its training found it better than the base, and no longer
                once a sweep was not helped), "hard" (all points at first), "linear" (fading), or a `Switch`.
            **options: See `forerun.picard.options.Options`: window, tolerance, norm, max_points_per_call, acceleration,
                coarse, warm_start, check_cost, auto, data_variance, exact, sweeps.

        Raises:
            TypeError: Not a diffusers pipeline, or an option that does not exist.
            ValueError: A scheduler, denoiser or pipeline that is not served, or an option out of range.
        """
        denoisers = host.pipeline_denoisers(pipe)
        rules.refuse_pipeline(pipe)
        consistency = Consistency.given(pcm, switch)
        scheduler = _parallel_scheduler(pipe.scheduler, options)
        families = [rules.family(host.family_name(module), unbatched) for module in denoisers]
        ranks = PointRanks(group, timeout) if distributed or group is not None else None
        scheduler._bind(zip(denoisers, families, strict=True), ranks, pipe, consistency)
        return scheduler

    @classmethod
    def from_config(
        cls, config: Any, return_unused_kwargs: bool = False, base: str | None = None, **kwargs: Any
    ) -> Any:
        """A scheduler from a diffusers scheduler's config; no denoiser is bound.

        It serves unconditional pipelines as it is, others after `from_pipe`.

        Args:
            config: A scheduler's `config`, or the dict of its JSON file.
            return_unused_kwargs: Also return what the base scheduler did not take, as diffusers does.
            base: Name of the base scheduler class; by default the one that the config names.
            **kwargs: Options (see `Options`) and arguments of the base scheduler.

        Raises:
            ValueError: No base scheduler is named, or it is not served.
        """
        if not hasattr(cls, "_base_class"):
            name = base or str(config.get("_class_name", "")).removeprefix("Picard")
            if not name:
                raise ValueError('the config names no scheduler class: give one, base="DDIMScheduler"')
            return _class_for(name).from_config(config, return_unused_kwargs, **kwargs)
        chosen = {name: kwargs.pop(name) for name in Options.names() & kwargs.keys()}
        options = Options(**{**Options.from_config(config.get(_OPTIONS_KEY, {})).as_config(), **chosen})
        made = super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]
        scheduler = made[0] if return_unused_kwargs else made
        scheduler._choose(options)
        _refuse_config(scheduler)
        return made

    @classmethod
    def from_pretrained(cls, path: Any, *, base: str | None = None, **kwargs: Any) -> Any:
        """Reads what `save_pretrained` wrote, or a base scheduler's own folder; no denoiser is bound."""
        if not hasattr(cls, "_base_class"):
            loader = {key: value for key, value in kwargs.items() if key not in Options.names()}
            name = base or host.load_scheduler_config(path, **loader).get("_class_name", "")
            return _class_for(name.removeprefix("Picard")).from_pretrained(path, **kwargs)
        return super().from_pretrained(path, **kwargs)  # type: ignore[misc]

    @classmethod
    def _get_compatibles(cls) -> Any:
        return cls._base_class._get_compatibles()

    def detach(self) -> Any:
        """Takes the hooks off and returns the base scheduler; assigns nothing: `pipe.scheduler = …detach()`."""
        self._picard_binding.undo()
        self._picard_run = None
        config = {name: value for name, value in self.config.items() if name != _OPTIONS_KEY}
        return self._base_class.from_config(config)

    @property
    def report(self) -> Report | None:
        """What the last run did; None before the first."""
        return self._picard_memory.report

    @property
    def options(self) -> Options:
        return self._picard_options

    def tell(self, told: Callable[[Asked], None] | None) -> None:
        """Tells `told` what later sweeps ask the denoiser, for those who train one; None: no longer."""
        self._picard_binding.tap(told)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._picard_run = None
        pipe = self._picard_binding.running_pipeline()
        if pipe is not None:
            rules.refuse_arguments(pipe, host.pipeline_arguments(pipe) or {})
        self.timesteps = SweepTimesteps.of(self.timesteps, self._turns)

    def scale_model_input(self, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        run = self._picard_run
        if run is None or not run.active:
            return super().scale_model_input(sample, timestep, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return run.scale(sample, self._base_copy().scale_model_input)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self._base_class.step).bind(self, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        run = self._picard_run
        if run is None or not run.drives(given["timestep"]):
            return self._step_alone(*args, **kwargs)
        if not self._picard_binding:
            self._refuse_conditional()
        for name in ("self", "timestep", "old_pred_original_sample", "timestep_back"):
            given.pop(name, None)
        output, sample = given.pop("model_output"), given.pop("sample")
        as_tuple = not given.pop(
            "return_dict", inspect.signature(self._base_class.step).parameters["return_dict"].default
        )
        if given.get("variance_noise") is not None:
            raise ValueError("step got variance_noise, the noise of one step: a sweep takes many; give a generator")
        result = run.step(output, sample, given)
        return tuple(result.values()) if as_tuple and isinstance(result, Mapping) else result

    def _choose(self, options: Options) -> None:
        self._picard_options = options
        self._picard_memory = Memory()
        self.register_to_config(**{_OPTIONS_KEY: options.as_config()})  # type: ignore[attr-defined]

    def _bind(
        self,
        modules: Iterable[tuple[nn.Module, Family]],
        ranks: PointRanks | None,
        pipe: Any | None = None,
        consistency: Consistency | None = None,
    ) -> None:
        owner = weakref.ref(self)
        self._picard_binding = Binding(
            modules,
            sweep=lambda: None if (it := owner()) is None or it._picard_run is None else it._picard_run.sweep(),
            max_points=self._picard_options.max_points_per_call,
            ranks=ranks,
            pipe=pipe,
            consistency=consistency,
        )
        if consistency is not None:
            self._picard_switch = consistency.card.switch
            self._picard_data_variance = consistency.card.data_variance
            consistency.warn_unless_for(self._base_class.__name__, self.config)

    def _turns(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The turns of one loop over (a part of) `timesteps`."""
        binding = self._picard_binding
        binding.begin_run()
        setting = Setting(
            widened=bool(binding),
            ranks=binding.ranks,
            switch=self._picard_switch,
            data_variance=self._picard_options.data_variance or self._picard_data_variance,
        )
        pipe = binding.running_pipeline()
        if pipe is not None:
            setting = replace(
                setting,
                mirrored=rules.is_mirrored(pipe, host.pipeline_arguments(pipe) or {}),
                cuts=rules.cuts(pipe, timesteps, self.config.num_train_timesteps),
                guidance=functools.partial(_guidance, weakref.ref(pipe)),
            )
        run = Run(self._base_copy(), timesteps, self._picard_options, setting, self._picard_memory)
        self._picard_run = run
        try:
            yield from run.turns()
        finally:
            binding.end_run()

    def _base_copy(self) -> Any:
        """A base scheduler in this one's state."""
        copy = object.__new__(self._base_class)
        copy.__dict__.update({name: value for name, value in vars(self).items() if not name.startswith("_picard")})
        if isinstance(copy.__dict__.get("timesteps"), SweepTimesteps):
            copy.__dict__["timesteps"] = copy.__dict__["timesteps"].plain
        return copy

    def _refuse_conditional(self) -> None:
        """A pipeline whose denoiser is not bound would be fed a window that its conditioning does not fit."""
        pipe = host.running_pipeline()
        if pipe is not None and type(pipe).__name__ not in _UNCONDITIONAL:
            raise RuntimeError(
                f"this {type(self).__name__} has no denoiser bound, which {type(pipe).__name__} needs: "
                "pipe.scheduler = PicardScheduler.from_pipe(pipe)"
            )

    def _step_alone(self, *args: Any, **kwargs: Any) -> Any:
        """The base scheduler's own step, for a loop that does not iterate over `timesteps` itself."""
        if self._picard_run is not None and not self._picard_warned:
            self._picard_warned = True
            warnings.warn(
                f"{type(self).__name__} steps aside: the loop does not iterate over scheduler.timesteps itself, so "
                "steps run one after the other",
                stacklevel=3,
            )
        self._picard_run = None
        return super().step(*args, **kwargs)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy without denoisers: hooks belong to the scheduler that set them."""
        return type(self).from_config(self.config)  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        return _rebuilt, (self._base_class.__name__, dict(self.config))


def parallel(
    model: nn.Module,
    scheduler: Any,
    *,
    unbatched: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
    distributed: bool = False,
    timeout: float = 60.0,
    pcm: Consistency | str | os.PathLike[str] | None = None,
    switch: Switch | str = "auto",
    **options: Any,
) -> PicardScheduler:
    """A scheduler for a bare loop, with no pipeline, that samples in parallel.

        scheduler = parallel(model, scheduler)
        scheduler.set_timesteps(100)
        for t in scheduler.timesteps:
            sample = scheduler.step(model(sample, t, condition), t, sample).prev_sample

    Args:
        model: The denoiser; its first argument is the sample, one is named `timestep`, `timesteps` or `t`. Hooked.
        scheduler: A diffusers scheduler. Not changed.
        unbatched: Arguments of the model whose tensors have no batch axis.
        group: As in `PicardScheduler.from_pipe`.
        distributed: As in `PicardScheduler.from_pipe`.
        timeout: As in `PicardScheduler.from_pipe`.
        pcm: As in `PicardScheduler.from_pipe`; of the model.
        switch: As in `PicardScheduler.from_pipe`.
        **options: See `forerun.picard.options.Options`.

    Raises:
        TypeError: The model is not a module.
        ValueError: A scheduler that is not served, or an option out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallel takes a torch module, whose calls it can widen, and got a {type(model).__name__}")
    found = Consistency.given(pcm, switch)
    made = _parallel_scheduler(scheduler, options)
    ranks = PointRanks(group, timeout) if distributed or group is not None else None
    made._bind([(model, Family(frozenset(unbatched)))], ranks, consistency=found)
    return made


def _parallel_scheduler(scheduler: Any, options: dict[str, Any]) -> PicardScheduler:
    unknown = options.keys() - Options.names()
    if unknown:
        raise TypeError(f"unknown options {', '.join(sorted(unknown))}; there are {', '.join(sorted(Options.names()))}")
    if isinstance(scheduler, PicardScheduler):
        options = {**scheduler.options.as_config(), **options}
        base = scheduler._base_class
    else:
        base = type(scheduler)
    made: PicardScheduler = _class_for(base.__name__).from_config(scheduler.config, **options)
    return made


@functools.cache
def _class_for(base_name: str) -> type[PicardScheduler]:
    """The parallel class of a base scheduler; an attribute of this module, so that it can be saved and reloaded."""
    if base_name not in SERVED:
        raise ValueError(f"{base_name} is not a scheduler that forerun serves; it serves {', '.join(SERVED)}")
    base = host.scheduler_class(base_name)
    made = type(f"Picard{base_name}", (PicardScheduler, base), {"_base_class": base, "__module__": __name__})
    # Pipelines look at signatures before they pass eta, generator, timesteps or sigmas.
    for name in ("set_timesteps", "step"):
        setattr(made, name, _signed(getattr(PicardScheduler, name), like=getattr(base, name)))
    if not hasattr(base, "scale_model_input"):
        made.scale_model_input = property(_no_scaling)  # type: ignore[attr-defined]
    setattr(sys.modules[__name__], made.__name__, made)
    return made


def _signed(method: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """`method` under the signature of `like`."""

    @functools.wraps(method)
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signed.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return signed


def __getattr__(name: str) -> Any:
    base = name.removeprefix("Picard")
    if base != name and base in SERVED:
        return _class_for(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse_config(scheduler: Any) -> None:
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"{scheduler._base_class.__name__} with stochastic_sampling=True draws noise that no generator can repeat, "
            "which a sweep needs; set it to False"
        )


def _guidance(pipe: Callable[[], Any]) -> dict[str, Any]:
    """The pipeline's guidance as its properties hold it: floats that a callback could change."""
    return {
        name: value
        for name, value in vars(pipe()).items()
        if name.startswith("_") and "guidance" in name and isinstance(value, (int, float))
    }


def _no_scaling(scheduler: Any) -> Any:
    raise AttributeError(f"{type(scheduler).__name__!r} object has no attribute 'scale_model_input'")


def _rebuilt(base_name: str, config: dict[str, Any]) -> Any:
    return _class_for(base_name).from_config(config)
