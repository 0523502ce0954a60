"""Pipelines and arguments that a sweep would get wrong, and what is done about each.

A pipeline's loop believes that every turn is one step at one timestep. In a sweep it is not: what a loop computes from
its counter `i` or its timestep `t`, and what it writes into the latents between steps, would be silently wrong for all
points but one. Each such case is served by a rule of its own or refused by name before the model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from forerun.picard.denoiser import Family
from forerun.picard.loops import computed_from_the_step

__all__ = ["cuts", "family", "is_mirrored", "refuse_arguments", "refuse_pipeline"]

_CONTROLLED = frozenset({"down_block_additional_residuals", "mid_block_additional_residual"})

_FAMILIES = {
    "UNet1DModel": Family(),
    "UNet2DModel": Family(),
    "UNet2DConditionModel": Family(made_by_denoisers=_CONTROLLED),
    "UNetMotionModel": Family(made_by_denoisers=_CONTROLLED, grouped=frozenset({"encoder_hidden_states"})),
    "UNetSpatioTemporalConditionModel": Family(),
    "ControlNetModel": Family(),
    "MultiControlNetModel": Family(),
    "DiTTransformer2DModel": Family(),
    "PixArtTransformer2DModel": Family(),
    "SD3Transformer2DModel": Family(made_by_denoisers=frozenset({"block_controlnet_hidden_states"})),
    "SD3ControlNetModel": Family(),
    "FluxTransformer2DModel": Family(
        unbatched=frozenset({"txt_ids", "img_ids"}),
        made_by_denoisers=frozenset({"controlnet_block_samples", "controlnet_single_block_samples"}),
    ),
    "WanTransformer3DModel": Family(),
    "CogVideoXTransformer3DModel": Family(unbatched=frozenset({"image_rotary_emb"})),
    "StableAudioDiTModel": Family(unbatched=frozenset({"rotary_embedding"})),
}


@dataclass(frozen=True)
class _Rule:
    """An argument of a pipeline's call that makes its loop compute something from `i` or `t`."""

    argument: str
    harmless: Callable[[Any], bool]
    because: str


_RULES = (
    _Rule("control_guidance_start", lambda v: _every(v, 0.0), "ControlNet would switch on by the loop's counter"),
    _Rule("control_guidance_end", lambda v: _every(v, 1.0), "ControlNet would switch off by the loop's counter"),
    _Rule("use_dynamic_cfg", lambda v: not v, "guidance would follow the loop's timestep"),
    _Rule("skip_guidance_layers", lambda v: v is None, "skip-layer guidance switches by the loop's counter"),
    _Rule("pag_adaptive_scale", lambda v: v == 0, "perturbed-attention guidance would follow the loop's timestep"),
    _Rule("sag_scale", lambda v: v == 0, "self-attention guidance steps the scheduler by itself"),
    _Rule("cfg_trunc_ratio", lambda v: v >= 1, "guidance would be switched off by the loop's counter"),
    _Rule("adapter_conditioning_factor", lambda v: v == 1, "the adapter would switch off by the loop's counter"),
    _Rule("gligen_phrases", lambda v: v is None, "GLIGEN switches off by the loop's counter"),
    _Rule("gligen_images", lambda v: v is None, "GLIGEN switches off by the loop's counter"),
    _Rule("pag_scale", lambda v: v == 0, "perturbed-attention guidance regroups the batch inside the model"),
)


def family(name: str, unbatched: tuple[str, ...] | None) -> Family:
    """How a denoiser class takes its arguments.

    Raises:
        ValueError: A class that is not known, and `unbatched` was not given.
    """
    known = _FAMILIES.get(name)
    if unbatched is not None:
        known = known or Family()
        return replace(known, unbatched=known.unbatched | set(unbatched))
    if known is None:
        raise ValueError(
            f"{name} is not a denoiser that forerun knows ({', '.join(sorted(_FAMILIES))}); if all its tensor "
            "arguments but some have a batch axis first, name those that have not: unbatched=('img_ids', …) or ()"
        )
    return known


def refuse_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline whose loop no rule can serve."""
    name = type(pipe).__name__
    parts = pipe.components  # a compiled one has no truth value
    unet = parts.get("transformer") if parts.get("unet") is None else parts.get("unet")
    vae = getattr(pipe, "vae", None)
    if "Inpaint" in name and vae is not None and unet is not None:
        latent = vae.config.get("latent_channels", 4)
        if unet.config.in_channels == latent or name.startswith("Flux"):
            raise ValueError(
                f"{name} with a {unet.config.in_channels}-channel denoiser edits latents between steps (it blends the "
                "known region in), which parallel sampling cannot serve; use a model made for inpainting (9 channels), "
                "or the sequential scheduler"
            )
    if pipe.config.get("expand_timesteps"):
        raise ValueError(
            f"{name} with expand_timesteps edits latents and timesteps between steps, which parallel sampling cannot "
            "serve; use the sequential scheduler"
        )
    computed = computed_from_the_step(type(pipe))
    if computed:
        raise ValueError(
            f"{name}'s loop computes from its own step: {'; '.join(computed)}. A sweep is not a step, so the "
            "result would be wrong; use the sequential scheduler"
        )


def refuse_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument of the running call that a sweep would get wrong."""
    _refuse_many_videos(pipe, arguments)
    for rule in _RULES:
        if rule.argument in arguments and not rule.harmless(arguments[rule.argument]):
            raise ValueError(
                f"{type(pipe).__name__} was called with {rule.argument}={arguments[rule.argument]!r}: {rule.because}, "
                "and a sweep is not a step; leave it out, or run with scheduler.detach()"
            )


def _refuse_many_videos(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Stable Video's guidance is a tensor with a row per video, which does not fit the rows of a window of several."""
    if type(pipe).__name__ != "StableVideoDiffusionPipeline":
        return
    image = arguments.get("image")
    images = len(image) if isinstance(image, (list, tuple, Tensor)) else 1
    videos = images * (arguments.get("num_videos_per_prompt") or 1)
    if videos > 1:
        raise ValueError(
            f"{type(pipe).__name__} was called for {videos} videos at once, and its guidance fits one a sweep; call "
            "it once per video, or run with scheduler.detach()"
        )


def cuts(pipe: Any, timesteps: Tensor, train_timesteps: int) -> tuple[int, ...]:
    """Points at which a sweep has to end, because the pipeline goes over to another model there (Wan 2.2)."""
    ratio = pipe.config.get("boundary_ratio")
    if ratio is None:
        return ()
    below = (timesteps < ratio * train_timesteps).nonzero().flatten()
    return (int(below[0]),) if len(below) else ()


def is_mirrored(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline's latents hold each sample twice (DiT under guidance)."""
    return type(pipe).__name__ == "DiTPipeline" and arguments.get("guidance_scale", 1.0) > 1


def _every(value: Any, wanted: float) -> bool:
    return all(item == wanted for item in (value if isinstance(value, (list, tuple)) else [value]))
