"""How the tests here run a pipeline under its base scheduler and under `PicardScheduler`, and compare the two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pipelines import Made
from torch import Tensor, nn

from forerun.picard.diffusers import PicardScheduler

SEED = 3


def sample(pipe: Any, arguments: dict[str, Any], **more: Any) -> Tensor:
    """What the pipeline makes of one seed: latents, where it can return them."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 10, "output_type": "latent", "generator": torch.Generator().manual_seed(SEED)}
    return torch.as_tensor(pipe(**{**given, **arguments, **more})[0])


@contextlib.contextmanager
def counted_calls(*modules: nn.Module) -> Iterator[list[int]]:
    """Rows of the model's batch, an entry per forward of one of the modules as it really runs (widened, in parts)."""
    rows: list[int] = []
    hooks = []
    for module in modules:
        inside = next(getattr(_plain(module), name) for name in _FIRST_LAYERS if hasattr(_plain(module), name))
        hooks.append(inside.register_forward_pre_hook(lambda _, given: rows.append(len(given[0]))))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


# Layers that every forward of a denoiser passes once; the first that a model has is its own.
_FIRST_LAYERS = ("conv_in", "x_embedder", "patch_embedding", "patch_embed", "pos_embed", "preprocess_conv")


def _plain(module: nn.Module) -> Any:
    return getattr(module, "_orig_mod", module)


def denoisers(pipe: Any) -> list[nn.Module]:
    found = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [module for module in found if module is not None]


def assert_same_image(parallel: Tensor, sequential: Tensor, within: float = 1e-5) -> None:
    assert parallel.shape == sequential.shape
    assert sequential.isfinite().all()
    largest = sequential.float().abs().max()
    difference = float((parallel.float() - sequential.float()).abs().max() / largest)
    assert difference <= within, f"relative difference {difference:.1e}"


def assert_exact_and_faster(
    made: Made,
    scheduler: Any | None = None,
    *,
    tolerance: float = 1e-3,
    within: float = 1e-5,
    error: float | None = 0.02,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """The sequential run, the one at tolerance 0 and the one at `tolerance`, of one seed.

    Asserts the first two equal, at no more model calls; and the last with fewer, at most `error` away.
    """
    pipe, arguments = made
    if scheduler is not None:
        pipe.scheduler = scheduler
    base = pipe.scheduler
    try:
        with counted_calls(*denoisers(pipe)) as calls:
            sequential = sample(pipe, arguments, **more)
            needed = len(calls)
            calls.clear()
            pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False, **(options or {}))
            exact = sample(pipe, arguments, **more)
            assert len(calls) <= needed or (options or {}).get("max_points_per_call")
            assert max(calls) > min(calls)  # something was asked in parallel
            assert_same_image(exact, sequential, within)
            if error is not None:
                calls.clear()
                pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=tolerance, check_cost=False)
                near = sample(pipe, arguments, **more)
                assert len(calls) < needed, f"{len(calls)} calls instead of {needed}"
                assert_same_image(near, sequential, error)
    finally:
        if isinstance(pipe.scheduler, PicardScheduler):
            pipe.scheduler.detach()
        pipe.scheduler = base
