"""A parallel scheduler is saved, loaded, copied and pickled like any scheduler of diffusers."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pipelines as made
import pytest
from comparison import assert_same_image, sample

from forerun.picard.diffusers import PicardScheduler

OPTIONS = {"window": 5, "tolerance": 1e-4, "check_cost": False}


@pytest.fixture(scope="module")
def stable_diffusion():
    pipe, arguments = made.stable_diffusion()
    sequential = sample(pipe, arguments)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, **OPTIONS)
    return pipe, arguments, sequential


def assert_same_scheduler(found, saved):
    assert type(found) is type(saved)
    assert found.options == saved.options
    assert _given(found) == _given(saved)


def _given(scheduler):
    return {
        name: value
        for name, value in scheduler.config.items()
        if name not in ("_diffusers_version", "_use_default_values")
    }


def test_a_whole_pipeline(stable_diffusion, tmp_path):
    """It comes back with the parallel class, its options, and no denoiser bound."""
    pipe, arguments, sequential = stable_diffusion
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__name__ == "PicardDDIMScheduler"
    assert isinstance(loaded.scheduler, PicardScheduler)
    assert loaded.scheduler.options == pipe.scheduler.options
    with pytest.raises(RuntimeError, match="from_pipe"):
        sample(loaded, arguments)
    loaded.scheduler = PicardScheduler.from_pipe(loaded, tolerance=0)
    assert loaded.scheduler.options.window == 5
    assert_same_image(sample(loaded, arguments), sequential)


def test_the_scheduler_alone(stable_diffusion, tmp_path):
    saved = stable_diffusion[0].scheduler
    saved.save_pretrained(tmp_path)
    assert_same_scheduler(PicardScheduler.from_pretrained(tmp_path), saved)
    other = PicardScheduler.from_pretrained(tmp_path, window=7)
    assert (other.options.window, other.options.tolerance) == (7, 1e-4)


def test_a_base_scheduler_folder(tmp_path):
    made.ddim().save_pretrained(tmp_path)
    loaded = PicardScheduler.from_pretrained(tmp_path, tolerance=1e-2)
    assert type(loaded).__name__ == "PicardDDIMScheduler"
    assert loaded.options.tolerance == 1e-2


def test_the_base_reads_what_the_parallel_one_wrote(stable_diffusion, tmp_path):
    stable_diffusion[0].scheduler.save_pretrained(tmp_path)
    base = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert type(base) is diffusers.DDIMScheduler
    assert base.config.beta_end == made.LATENT["beta_end"]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_copies(stable_diffusion, way):
    """A copy has the options and no denoiser; the original keeps its own."""
    pipe, arguments, sequential = stable_diffusion
    assert_same_scheduler(way(pipe.scheduler), pipe.scheduler)
    assert_same_image(sample(pipe, arguments), sequential, 0.02)


def test_another_class_from_the_config(stable_diffusion):
    """Schedulers are exchanged by config, options and all."""
    config = stable_diffusion[0].scheduler.config
    assert type(diffusers.EulerDiscreteScheduler.from_config(config)) is diffusers.EulerDiscreteScheduler
    euler = PicardScheduler.from_config(config, base="EulerDiscreteScheduler")
    assert isinstance(euler, diffusers.EulerDiscreteScheduler)
    assert euler.options.window == 5
