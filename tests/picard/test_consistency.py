"""A Picard Consistency Model on disk, on a pipeline, and in certified runs on the digits model."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pipelines as made
import pytest
import torch
from accelerate import cpu_offload
from comparison import assert_same_image, counted_calls, sample
from consistency_models import as_found, consistency, random_lora, tuned

from forerun.picard.consistency import Base, Consistency
from forerun.picard.diffusers import PicardScheduler, parallel
from forerun.picard.levels import DATA_VARIANCE
from forerun.picard.switch import Switch

_DIGITS = Path(__file__).parents[2] / "examples" / "assets" / "digits"
_UNET, _PCM = _DIGITS / "unet", _DIGITS / "pcm"


def _same(left: Consistency, right: Consistency) -> bool:
    layers = left.change.layers.keys() == right.change.layers.keys() and all(
        torch.equal(one, other)
        for name in left.change.layers
        for one, other in zip(left.change.layers[name], right.change.layers[name], strict=True)
    )
    return layers and left.card == right.card


def test_save_and_load(tmp_path):
    unet = made.unet()
    pcm = consistency(unet, random_lora(unet, 0.5), ages=2, training={"loss": 0.5})
    pcm.save(tmp_path / "pcm")
    assert _same(Consistency.load(tmp_path / "pcm"), pcm)
    assert sorted(path.name for path in (tmp_path / "pcm").iterdir()) == [
        "picard.json",
        "pytorch_lora_weights.safetensors",
    ]


def test_diffusers_loads_it_as_a_lora(tmp_path):
    pipe, arguments = made.stable_diffusion()
    lora = random_lora(pipe.unet, 0.3)
    consistency(pipe.unet, lora).save(tmp_path)
    ours = lora.on(pipe.unet)
    rows = torch.ones(4)
    with ours.weighted(rows):
        expected = sample(pipe, arguments)
    pipe.load_lora_weights(tmp_path)
    assert_same_image(sample(pipe, arguments), expected)


def test_a_half_precision_copy_is_the_same_base():
    unet = made.unet()
    base = Base.of(unet, "here")
    assert base.same(Base.of(made.unet().half(), "there")) is False  # other random weights
    assert base.same(Base.of(unet.to(torch.bfloat16), "there"))
    torch.manual_seed(0)
    unet = made.unet()
    base = Base.of(unet, "here")
    assert base.same(Base.of(unet.half(), "there"))


def test_another_base_is_refused_with_both_names():
    pipe, _ = made.stable_diffusion()
    torch.manual_seed(5)
    other = made.unet()
    pcm = consistency(other, random_lora(other, 0.1))
    with pytest.raises(ValueError, match=r"from tests/model \(UNet.*pipeline's model is UNet.*other weights"):
        PicardScheduler.from_pipe(pipe, pcm=pcm)
    assert not hasattr(pipe.unet, "_diffusers_hook")
    xl, _ = made.stable_diffusion_xl()
    with pytest.raises(ValueError, match=r"trained from .* parameters\), and the pipeline's model is .* parameters\)"):
        PicardScheduler.from_pipe(xl, pcm=pcm)
    with pytest.raises(ValueError, match="changes a transformer, and the pipeline has unet"):
        PicardScheduler.from_pipe(pipe, pcm=consistency(other, random_lora(other, 0.1), component="transformer"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "picard.json").unlink(), FileNotFoundError, "no picard.json in it"),
        (lambda folder: (folder / "picard.json").write_text("{"), ValueError, "broken"),
        (lambda folder: (folder / "picard.json").write_text('{"format": 2}'), ValueError, "later format"),
        (lambda folder: _cut(folder / "pytorch_lora_weights.safetensors"), ValueError, "broken"),
        (lambda folder: _without_switch(folder / "picard.json"), ValueError, "switch"),
    ],
)
def test_broken_files_are_named(tmp_path, spoil, error, message):
    unet = made.unet()
    consistency(unet, random_lora(unet, 0.1)).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        Consistency.load(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _without_switch(path: Path) -> None:
    card = json.loads(path.read_text())
    del card["switch"]
    path.write_text(json.dumps(card))


def test_a_disk_that_takes_nothing_leaves_no_broken_file(tmp_path, monkeypatch):
    unet = made.unet()
    before = consistency(unet, random_lora(unet, 0.1))
    before.save(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        consistency(unet, random_lora(unet, 0.9)).save(tmp_path)
    assert _same(Consistency.load(tmp_path), before)
    assert not list(tmp_path.glob("*.unfinished"))


def test_on_a_pipeline():
    """Guidance, several rows a sample, parts of a call: the result is the sequential one; detached, nothing is left."""
    pipe, arguments = made.stable_diffusion()
    sequential, before = sample(pipe, arguments), as_found(pipe.unet)
    pcm = consistency(pipe.unet, random_lora(pipe.unet, 0.5))
    for options in ({}, {"max_points_per_call": 3}, {"window": 4}):
        pipe.scheduler = PicardScheduler.from_pipe(pipe, pcm=pcm, tolerance=0, check_cost=False, **options)
        with counted_calls(pipe.unet) as calls:
            assert_same_image(sample(pipe, arguments), sequential)
        assert len(calls) >= pipe.scheduler.report.rounds <= 10
        assert pipe.scheduler.report.guided_rounds >= 1
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)  # again, without
    sample(pipe, arguments)
    assert pipe.scheduler.report.guided_rounds == 0
    pipe.scheduler = PicardScheduler.from_pipe(pipe, pcm=pcm).detach()
    assert as_found(pipe.unet) == before
    assert torch.equal(sample(pipe, arguments), sequential)


def test_offloading_layer_by_layer():
    """A LoRA put on before works as without; after, the base model cannot be looked at, and that is said."""
    pipe, arguments = made.stable_diffusion()
    sequential = sample(pipe, arguments)
    pcm = consistency(pipe.unet, random_lora(pipe.unet, 0.1), ages=2)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, pcm=pcm, switch="hard", tolerance=0, check_cost=False)
    sample(pipe, arguments)
    guided = pipe.scheduler.report.guided_rounds  # of this model's weights, which differ with the release
    assert guided >= 1
    cpu_offload(pipe.unet, torch.device("cpu"))
    assert_same_image(sample(pipe, arguments), sequential)
    assert pipe.scheduler.report.guided_rounds == guided
    with pytest.raises(ValueError, match=r"holds no weights between its calls.*before enable_sequential_cpu_offload"):
        PicardScheduler.from_pipe(pipe, pcm=pcm)


def test_another_scheduler_is_warned_about():
    pipe, _ = made.stable_diffusion()
    pcm = consistency(pipe.unet, random_lora(pipe.unet, 0.5), scheduler_config={"beta_start": 0.5})
    with pytest.warns(
        UserWarning, match=r"trained for DDIMScheduler, and runs under DDIMScheduler \(beta_start differ"
    ):
        PicardScheduler.from_pipe(pipe, pcm=pcm).detach()


@pytest.mark.parametrize("switch", ["sometimes", 3])
def test_a_bad_switch(switch):
    pipe, _ = made.stable_diffusion()
    with pytest.raises(ValueError, match="one of auto, hard, linear"):
        PicardScheduler.from_pipe(pipe, pcm=consistency(pipe.unet, random_lora(pipe.unet, 0.5)), switch=switch)


@pytest.fixture(scope="module")
def unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel.from_pretrained(_UNET).eval()


@torch.no_grad()
def _sample(unet, scheduler, seed: int, steps: int = 50):
    scheduler.set_timesteps(steps)
    current = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(current, t)
        current = scheduler.step(unet(given, t).sample, t, current).prev_sample
    return current


AGES = 2
MORE_ROUNDS = AGES + 2  # at most, whatever the PCM answers


def _without(unet, base):
    """For each acceleration: the sequential sample, and the rounds of a parallel run that has no PCM."""
    found = {}
    for acceleration in ("none", "secant"):
        plain = parallel(unet, base, acceleration=acceleration, check_cost=False)
        _sample(unet, plain, 0, 25)
        plain.detach()
        found[acceleration] = (_sample(unet, base, 0, 25), plain.report.rounds)
    return found


@pytest.fixture(scope="module")
def without(unet):
    return _without(unet, diffusers.DDIMScheduler(clip_sample=False))


@pytest.mark.filterwarnings("ignore:the Picard Consistency Model was trained for DDIMScheduler")
@pytest.mark.parametrize(
    "base",
    [
        diffusers.EulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    ],
    ids=["Euler", "DPM-Solver++", "DDIM, other noise", "DDIM, other prediction"],
)
def test_one_trained_for_another_scheduler_costs_rounds_and_never_the_result(unet, base):
    pcm = Consistency.load(_PCM)
    for acceleration, (sequential, rounds) in _without(unet, base).items():
        guided = parallel(unet, base, pcm=pcm, acceleration=acceleration, check_cost=False)
        result = _sample(unet, guided, 0, 25)
        guided.detach()
        assert float((result - sequential).norm() / sequential.norm()) <= 1e-3
        assert guided.report.guided_rounds >= 1
        assert guided.report.rounds <= rounds + MORE_ROUNDS


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0, 100.0, float("nan")])
@pytest.mark.parametrize(("acceleration", "switch"), [("none", "hard"), ("secant", "auto"), ("secant", "linear")])
def test_a_bad_one_costs_rounds_and_never_the_result(unet, without, acceleration, switch, size):
    sequential, rounds = without[acceleration]
    pcm = consistency(unet, random_lora(unet, size), ages=AGES)
    base = diffusers.DDIMScheduler(clip_sample=False)
    guided = parallel(unet, base, pcm=pcm, switch=switch, acceleration=acceleration, check_cost=False)
    result = _sample(unet, guided, 0, 25)
    guided.detach()
    assert float((result - sequential).norm() / sequential.norm()) <= 1e-3
    assert guided.report.residual <= 1e-3
    assert 1 <= guided.report.guided_rounds <= AGES
    assert guided.report.rounds <= rounds + MORE_ROUNDS


def test_the_digits_models_own_needs_fewer_rounds(unet):
    """At the tolerance of the papers (0.1 of the noise) and certified, with acceleration and without."""
    base, seeds = diffusers.DDIMScheduler(clip_sample=False), range(700_000_000, 700_000_008)
    rounds = {}
    for tolerance in ({"norm": "noise", "tolerance": 0.1}, {"tolerance": 1e-2}, {"tolerance": 1e-3}):
        for acceleration, pcm in ((one, other) for one in ("none", "secant") for other in (None, _PCM)):
            scheduler = parallel(unet, base, pcm=pcm, acceleration=acceleration, check_cost=False, **tolerance)
            for seed in seeds:
                _sample(unet, scheduler, seed, 50)
                rounds.setdefault((acceleration, pcm), []).append(scheduler.report.rounds)
            scheduler.detach()
    total = {way: sum(found) for way, found in rounds.items()}
    assert total["none", None] / total["none", _PCM] >= 1.77  # arXiv 2503.19731's own gain over Picard iteration
    assert total["secant", _PCM] < total["secant", None]


def test_a_few_sweeps_and_no_more_are_called_approximate(unet):
    base = diffusers.DDIMScheduler(clip_sample=False)
    for pcm in (None, consistency(unet, random_lora(unet, 0.01))):
        quick = parallel(unet, base, pcm=pcm, exact=False, sweeps=3, check_cost=False)
        _sample(unet, quick, 0)
        assert quick.report.rounds == 3
        assert quick.report.stopped == "approximate"
        assert quick.report.guided_rounds == (0 if pcm is None else 1)
        quick.detach()
    for options in ({"exact": False}, {"sweeps": 3}):
        with pytest.raises(ValueError, match="exact=False and sweeps together"):
            parallel(unet, base, **options)
    with pytest.raises(ValueError, match="no window"):
        parallel(unet, base, exact=False, sweeps=3, window=5)


def test_it_brings_the_data_variance_that_it_was_trained_under(unet):
    """And takes it along: from a scheduler to the next, only what the user chose stays."""
    base = diffusers.DDIMScheduler(clip_sample=False)
    pcm = consistency(unet, random_lora(unet, 0.01), data_variance=0.05)
    sequential = _sample(unet, base, 3, 20)

    def residuals(scheduler):
        result = _sample(unet, scheduler, 3, 20)
        assert float((result - sequential).norm() / sequential.norm()) <= 1e-3
        return scheduler.report.residuals

    def made(of, **options):
        return parallel(unet, of, check_cost=False, **options)

    default, own, chosen = (
        residuals(made(base, pcm=pcm, data_variance=variance)) for variance in (DATA_VARIANCE, 0.05, 0.5)
    )
    without = residuals(made(base, data_variance=DATA_VARIANCE))
    assert len({default, own, chosen, without}) == 4
    assert residuals(made(base, pcm=pcm)) == own
    plain = made(base)
    assert residuals(made(plain, pcm=pcm)) == own
    guided = made(base, pcm=pcm)
    assert residuals(made(guided)) == without
    assert residuals(made(type(guided).from_config(guided.config))) == without
    mine = made(made(base, data_variance=0.5), pcm=pcm)
    assert residuals(mine) == chosen
    mine.detach()


@pytest.mark.parametrize("kind", ["LoRA", "whole"])
def test_what_is_measured_of_the_cost_is_the_base_models(unet, kind):
    base = diffusers.DDIMScheduler(clip_sample=False)
    change = random_lora(unet, 0.01) if kind == "LoRA" else tuned(unet, 0.0)
    pcm = consistency(unet, change, ages=2, rank=4 if kind == "LoRA" else None)
    plain = parallel(unet, base, auto=True)
    _sample(unet, plain, 0)
    guided = parallel(unet, base, pcm=pcm, switch="hard", auto=True)
    changed = type(guided._picard_binding._bound[0][1].change)
    sweeps, measured, answer = [], [], changed.answer

    class Watched(dict):
        def __setitem__(self, key, cost):
            measured.append((len(sweeps), cost.points))
            super().__setitem__(key, cost)

    def counted(*arguments):
        sweeps.append(1)
        return answer(*arguments)

    guided._picard_memory.cost = Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changed, "answer", counted)
        _sample(unet, guided, 0)
    assert len(sweeps) == 2  # no call with the PCM is made to be timed
    ((after, points),) = measured
    assert after == 2  # the PCM had answered for the last time
    assert 25 <= points < 50
    assert guided.report.cost["points"] == points
    assert plain.report.cost["points"] == 49
    guided.detach()


def test_a_switch_of_ones_own(unet):
    base = diffusers.DDIMScheduler(clip_sample=False)
    late = Switch((5.0,), watch=False)  # only where there is little noise left
    guided = parallel(unet, base, pcm=consistency(unet, random_lora(unet, 1.0)), switch=late, check_cost=False)
    result = _sample(unet, guided, 3)
    assert guided.report.guided_rounds == 1
    sequential = _sample(unet, base, 3)
    assert float((result - sequential).norm() / sequential.norm()) <= 1e-3
    guided.detach()
