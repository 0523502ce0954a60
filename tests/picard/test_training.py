"""Training a Picard Consistency Model: targets, trajectories on disk, what is learned, kills, resumes, the command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from comparison import assert_same_image, sample
from consistency_models import as_found
from peft import LoraConfig, inject_adapter_in_model
from sequences import Net
from training_program import CHOICES, SHAPE, run, source
from typer.testing import CliRunner

from forerun import cli
from forerun.picard.consistency import Base, Consistency
from forerun.picard.denoiser import Asked
from forerun.picard.diffusers import PicardScheduler, parallel
from forerun.picard.diffusers_training import LoopSource, PipelineSource
from forerun.picard.objective import rows_of
from forerun.picard.sweep_objective import SweepObjective
from forerun.picard.trainer import _accelerator
from forerun.picard.training import Training, train
from forerun.picard.trajectories import Trajectory, cached


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate holds one precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


_UNET = Path(__file__).parents[2] / "examples" / "assets" / "digits" / "unet"


def _trajectory(steps=3, rows=2):
    return Trajectory(
        inputs=torch.randn(steps, rows, 2, 4),
        answers=torch.randn(steps, rows, 2, 4),
        times=torch.arange(steps),
        others={
            "text": torch.randn(rows, 5),
            "added": {"ids": (torch.ones(rows), 2)},
            "return_dict": False,
            "mask": None,
        },
    )


def _assert_same(left, right):
    for name in ("inputs", "answers", "times"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert left.others.keys() == right.others.keys()
    assert torch.equal(left.others["added"]["ids"][0], right.others["added"]["ids"][0])
    assert right.others["added"]["ids"][1] == 2
    assert right.others["return_dict"] is False
    assert right.others["mask"] is None


def test_trajectories_on_disk(tmp_path):
    trajectory = _trajectory()
    calls = []

    def make():
        calls.append(1)
        return [trajectory]

    for _ in range(2):
        _assert_same(cached(tmp_path / "a", make)[0], trajectory)
    assert len(calls) == 1
    (tmp_path / "a" / "complete").unlink()  # killed before the last file
    cached(tmp_path / "a", make)
    assert len(calls) == 2
    (tmp_path / "a" / "00.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="holds no trajectory"):
        cached(tmp_path / "a", make)


def test_arguments_that_share_memory_are_kept(tmp_path):
    shared = torch.randn(2, 5)
    others = {"one": shared, "same": shared, "part": shared[:1]}
    trajectory = Trajectory(torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.arange(3), others)
    trajectory.save(tmp_path / "it.safetensors")
    loaded = Trajectory.load(tmp_path / "it.safetensors").others
    assert all(torch.equal(loaded[name], others[name]) for name in others)


def test_targets_are_the_finished_answers_carried_back_along_the_slope():
    finished, slope = _trajectory(), torch.tensor([0.5, 2.0, -1.0])
    given = torch.randn(2, 2, 2, 4)  # two rows at two points
    rows = rows_of([finished], [Asked(0, (1, 2), given), Asked(0, (2,), given[:, :1])], slope)
    assert rows.points.tolist() == [1, 1, 2, 2, 2, 2]
    assert rows.ages.tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.owners.tolist() == [[0, 0], [0, 1]] * 3
    for index in range(len(rows)):
        point, row = int(rows.points[index]), int(rows.owners[index, 1])
        carried = rows.targets[index] + slope[point] * (finished.inputs[point, row] - rows.samples[index])
        assert torch.allclose(carried, finished.answers[point, row], atol=1e-6)


def test_a_perfect_answer_ends_in_one_sweep():
    """An oracle that answers the targets: the rebuild lands on the sequential trajectory."""
    origin = LoopSource(Net(), diffusers.DDIMScheduler(clip_sample=False), SHAPE)
    _, slope = origin.levels(6)
    finished, asked = origin.finished(6, [1]), []
    model, base = origin.module, diffusers.DDIMScheduler(clip_sample=False)

    class Oracle(torch.nn.Module):
        def forward(self, sample, timestep):
            if len(sample) == 1:
                return model(sample, timestep)
            rows = rows_of(finished, [Asked(0, tuple(range(6 - len(sample), 6)), sample[None])], slope)
            asked.append(len(sample))
            return rows.targets

    ours = parallel(Oracle(), base, acceleration="secant", exact=False, sweeps=1, check_cost=False)
    ours.set_timesteps(6)
    current = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = current
    with torch.no_grad():
        for t in ours.timesteps:
            current = ours.step(ours_model(ours, current, t), t, current).prev_sample
        base.set_timesteps(6)
        for t in base.timesteps:
            expected = base.step(model(expected, t), t, expected).prev_sample
    assert asked == [6]
    assert_same_image(current, expected)


def test_finished_points_are_the_history_of_a_multistep_sampler():
    origin = LoopSource(Net(), diffusers.DPMSolverMultistepScheduler(num_train_timesteps=100), SHAPE)
    _, slope = origin.levels(6)
    finished = origin.finished(6, [1, 2])
    given = finished[0].inputs.transpose(0, 1) + torch.randn(2, 6, *SHAPE) * 0.3
    given[:, 3] = finished[0].inputs[3]
    rows = rows_of(finished, [Asked(0, (3, 4, 5), given[:, 3:])], slope)
    objective = SweepObjective(origin.solver(6), slope, finished, 1)
    index = objective.pick(rows, torch.Generator().manual_seed(0))
    assert float(objective.loss(rows.targets[index], rows[index])) < 1e-8


def test_the_objective_of_whole_sweeps():
    """Nothing for answers that land on the finished trajectory; what a step makes of it for others; refusals."""
    origin = LoopSource(Net(), diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False), SHAPE)
    _, slope = origin.levels(6)
    finished = origin.finished(6, [1, 2])
    given = finished[0].inputs.transpose(0, 1) + torch.randn(2, 6, *SHAPE) * 0.3
    given[:, 0] = finished[0].inputs[0]
    rows = rows_of(finished, [Asked(0, tuple(range(6)), given), Asked(0, (3, 4, 5), given[:, 3:])], slope)
    objective = SweepObjective(origin.solver(6), slope, finished, 1)
    index = objective.pick(rows, torch.Generator().manual_seed(0))
    assert rows.points[index].tolist() in ([0, 1, 2, 3, 4, 5], [3, 4, 5])
    assert len(rows.owners[index].unique(dim=0)) == 1
    assert float(objective.loss(rows.targets[index], rows[index])) < 1e-10
    assert objective.table(rows.targets, rows).shape == (2, 1)
    off = rows.targets.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss((off + 0.1)[index], rows[index]), off)
    assert (gradient.flatten(1).norm(dim=1) > 0).nonzero().flatten().tolist() == sorted(index.tolist())
    noisy = LoopSource(Net(), diffusers.DDPMScheduler(num_train_timesteps=100, clip_sample=False), SHAPE)
    finished = noisy.finished(6, [1, 2])
    with pytest.raises(ValueError, match="without guidance and random draws"):
        SweepObjective(noisy.solver(6), slope, finished, 1)
    with pytest.raises(ValueError, match="objective is 'paper'; give one of points, sweep"):
        Training(objective="paper")


def ours_model(scheduler, current, t):
    """The oracle under the scheduler's hook."""
    module = next(module for module, _ in scheduler._picard_binding._modules())
    return module(current, t)


@pytest.mark.parametrize(
    ("choices", "most"),
    [({}, 0.8), ({"full": True, "learning_rate": 1e-4}, 0.8), ({"objective": "sweep", "learning_rate": 1e-3}, 0.95)],
    ids=["points", "full", "sweep"],
)
def test_it_learns_and_leaves_the_model_as_it_was(tmp_path, choices, most):
    unet = diffusers.UNet2DModel.from_pretrained(_UNET).eval()
    origin = LoopSource(unet, diffusers.DDIMScheduler(clip_sample=False), (1, 8, 8))
    before = {name: value.clone() for name, value in origin.module.state_dict().items()}
    found = as_found(unet)
    told = []
    training = Training(**{**CHOICES, "turns": 12, "measure_every": 6, "batch": 48, "ema": 0.9, **choices})
    pcm = train(origin, tmp_path, training, progress=lambda turn, loss, measured: told.append((turn, measured)))
    assert [turn for turn, measured in told if measured] == [6, 12]
    assert told[-1][1]["error"] < most * told[-1][1]["base_error"]
    assert as_found(unet) == found
    assert all(parameter.requires_grad for parameter in origin.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in origin.module.state_dict().items())
    lora, model = ["pytorch_lora_weights.safetensors"], ["config.json", "diffusion_pytorch_model.safetensors"]
    expected = sorted(["picard.json", *(model if training.full else lora)])
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert pcm.card.steps == 6
    assert pcm.card.training["history"][-1]["updates"] == 48
    again = Consistency.load(tmp_path)
    ours = parallel(origin.module, origin._base, pcm=again, check_cost=False)
    ours.detach()


def test_killed_it_goes_on_to_the_same_result(tmp_path):
    whole = run(tmp_path / "whole", 6)
    program = [sys.executable, str(Path(__file__).with_name("training_program.py")), str(tmp_path / "killed"), "6"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("3 "):  # a checkpoint is behind it, and a turn that is lost
                process.kill()
                break
    assert (tmp_path / "killed" / "checkpoint.pt").is_file()
    assert not (tmp_path / "killed" / "picard.json").exists()
    resumed = run(tmp_path / "killed", 6)
    assert resumed.card.switch == whole.card.switch
    for name, pair in whole.change.layers.items():
        for one, other in zip(pair, resumed.change.layers[name], strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()


def test_two_processes_train_one_model(tmp_path):
    """As `accelerate launch` starts them: each on noise of its own, the same weights on both, one result and cache."""
    cache = tmp_path / "cache"
    first = _two_processes(tmp_path / "first", cache)
    assert first[0][:-1] != first[1][:-1]  # noise of its own
    assert first[0][-1] == first[1][-1]  # digest of the weights
    (kept,) = cache.iterdir()
    made = {path: path.stat().st_mtime_ns for path in kept.glob("*/*")}
    # Four turns of each process, and what is held out, which both have.
    assert len([path for path in made if path.name == "complete"]) == 2 * 4 + 1
    assert not [path for path in made if path.name.endswith("unfinished")]
    assert all(Trajectory.load(path).inputs.shape == (6, 4, *SHAPE) for path in made if path.suffix == ".safetensors")
    assert _two_processes(tmp_path / "again", cache) == first
    assert {path: path.stat().st_mtime_ns for path in kept.glob("*/*")} == made  # taken from there
    alone = run(tmp_path / "alone", 4)
    assert Consistency.load(tmp_path / "first").card.base == alone.card.base
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "picard.json",
        "pytorch_lora_weights.safetensors",
    ]


def _two_processes(out, cache):
    """The lines that each of them prints."""
    program = [sys.executable, str(Path(__file__).with_name("training_program.py")), str(out), "4", str(cache)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    try:
        for rank in ("0", "1"):
            environment = {**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
            processes.append(subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True))
        told = [process.communicate(timeout=240)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0]
    return told


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Consistency, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, 2)
    monkeypatch.undo()
    origin = source()
    found = as_found(origin.module)
    with pytest.raises(ValueError, match="of another training"):
        train(origin, tmp_path, Training(**{**CHOICES, "turns": 4}))
    assert as_found(origin.module) == found
    assert all(parameter.requires_grad for parameter in origin.module.parameters())
    other = LoopSource(Net(), diffusers.DDIMScheduler(num_train_timesteps=100, beta_end=0.01), SHAPE)
    with pytest.raises(ValueError, match="of another training"):
        train(other, tmp_path, Training(**{**CHOICES, "turns": 2}))
    assert run(tmp_path, 2).card.steps == 6  # the checkpoint was there: nothing was lost


@pytest.mark.parametrize(
    "build",
    [made.stable_diffusion, made.stable_diffusion_xl, dits.pixart, dits.stable_diffusion_3, dits.flux],
    ids=lambda build: build.__name__,
)
def test_for_a_guided_pipeline(tmp_path, build):
    pipe, arguments = build()
    arguments = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    sequential = sample(pipe, arguments)
    scheduler = pipe.scheduler
    origin = PipelineSource(pipe, **arguments)
    samples = 1 if "prompt_embeds" in arguments else 2  # diffusers does not repeat embeddings that it is given
    pcm = train(origin, tmp_path, Training(**{**CHOICES, "turns": 2, "samples": samples, "held_out": samples}))
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(pipe, arguments), sequential)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, pcm=tmp_path, switch="hard", tolerance=0, check_cost=False)
    assert_same_image(sample(pipe, arguments), sequential)
    # A random PixArt's samples are larger than any data's: its PCM is given up in its first sweep.
    expected = 1 if build is dits.pixart else len(pcm.card.switch.from_signal)
    assert pipe.scheduler.report.guided_rounds == expected
    pipe.scheduler.detach()


def test_bf16_and_gradient_checkpointing(tmp_path):
    torch.manual_seed(0)
    model = made.unet()
    origin = LoopSource(
        model,
        diffusers.DDIMScheduler(clip_sample=False),
        (4, 8, 8),
        lambda seeds: {"encoder_hidden_states": torch.ones(len(seeds), 5, 32)},
    )
    choices = {**CHOICES, "turns": 2, "mixed_precision": "bf16", "gradient_checkpointing": True}
    pcm = train(origin, tmp_path, Training(**choices))
    assert all(torch.isfinite(up).all() for _, up in pcm.change.layers.values())
    assert any(bool(up.any()) for _, up in pcm.change.layers.values())
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(tmp_path, dtype, full):
    """It computes as it does, what is trained is kept in single precision."""
    model = Net().to(dtype)
    origin = LoopSource(model, diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False), SHAPE)
    before = {name: value.clone() for name, value in model.named_parameters()}
    pcm = train(origin, tmp_path, Training(**{**CHOICES, "turns": 2, "full": full}))
    values = pcm.change.values if full else {name: up for name, (_, up) in pcm.change.layers.items()}
    assert {value.dtype for value in values.values()} == {torch.float32}
    changed = [name for name, value in values.items() if not torch.equal(value, before.get(name, 0 * value).float())]
    assert len(changed) == len(values)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    ours = parallel(model, origin._base, pcm=tmp_path, switch="hard", check_cost=False)
    origin._sample(ours, 6, [5])
    assert ours.report.guided_rounds >= 1


@pytest.mark.parametrize("full", [True, False])
def test_what_stands_around_the_bases_layers_is_not_trained(tmp_path, full):
    """A LoRA of the user's own, and torch.compile's wrapper: the result is of the base model's layers."""
    names = {name for name, _ in Net().named_parameters()}
    model = Net()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["first", "time"], init_lora_weights=False), model)
    wrapped = torch.compile(model, backend="eager")
    origin = LoopSource(wrapped, diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False), SHAPE)
    pcm = train(origin, tmp_path, Training(**{**CHOICES, "turns": 1, "full": full}))
    loaded = Consistency.load(tmp_path)
    assert loaded.card.base.same(Base.of(Net(), "plain"))
    trained = set(loaded.change.values) if full else {f"{name}.weight" for name in loaded.change.layers}
    assert trained == (names if full else {name for name in names if name.endswith("weight")})
    loaded.change.on(model)
    assert pcm.card == loaded.card


def test_a_cache_is_kept_apart_by_what_is_sampled(tmp_path):
    pipe, arguments = made.stable_diffusion()
    prompts = [PipelineSource(pipe, **{**arguments, "prompt": prompt}).fingerprint() for prompt in ("a", "b", "a")]
    assert prompts[0] == prompts[2] != prompts[1]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    styled = PipelineSource(pipe, **{**arguments, "prompt": "a"}).fingerprint()
    assert styled not in prompts
    for _ in range(2):
        run(tmp_path / "out", 1, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [source().fingerprint()]
    assert len(list((tmp_path / "cache").glob("*/*/complete"))) == 2  # one turn, and what is held out


def test_what_cannot_be_trained(tmp_path):
    pipe, arguments = made.controlnet()
    with pytest.raises(ValueError, match="has 2 denoisers"):
        PipelineSource(pipe, **arguments)
    with pytest.raises(ValueError, match="makes 11 model calls of 6 steps"):
        LoopSource(Net(), diffusers.HeunDiscreteScheduler(), SHAPE).levels(6)
    with pytest.raises(ValueError, match="Net has no gradient checkpointing"):
        train(source(), tmp_path, Training(**{**CHOICES, "gradient_checkpointing": True}))
    model, base = Net(), diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="in parallel already"):
        LoopSource(model, parallel(model, base), SHAPE)
    for choice in (
        {"steps": 0},
        {"rank": 1.5},
        {"ema": 1.0},
        {"pool": 0},
        {"learning_rate": 0.0},
        {"data_variance": -1.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(choice))} is"):
            Training(**choice)


@pytest.fixture
def command():
    return lambda *arguments: CliRunner().invoke(cli.app, ["picard", "train", *map(str, arguments)])


def test_the_command(tmp_path, command):
    pipe, _ = made.unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "pipe")
    config = tmp_path / "train.toml"
    numbers = "\n".join(f"{name} = {value}" for name, value in CHOICES.items() if name not in ("steps", "rank"))
    config.write_text(f'pipeline = "{tmp_path / "pipe"}"\n[call]\noutput_type = "np"\n[training]\n{numbers}\n')
    result = command(config, "--out", tmp_path / "pcm", "--steps", 5, "--turns", 2, "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "rounds on noise not trained on" in result.stdout
    card = json.loads((tmp_path / "pcm" / "picard.json").read_text())
    assert (card["steps"], card["rank"], card["base"]["name"]) == (5, 2, str(tmp_path / "pipe" / "unet"))


def test_accelerate_knows_the_device_before_a_pipeline_is_loaded(tmp_path, command):
    """Of several processes each has its own; one that loaded before that would take the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert command("--pipeline", tmp_path / "nowhere").exit_code == 1
    assert PartialState._shared_state["device"] == torch.device("cpu")


def test_a_model_on_another_process_device_is_refused():
    """Two processes, of which this one trains on the CPU, and a model that is elsewhere."""
    PartialState(cpu=True)
    PartialState._shared_state["num_processes"] = 2
    with pytest.raises(ValueError, match=r"the model is on meta, and process 0 of 2 trains on cpu"):
        _accelerator(Training(), torch.device("meta"))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "no pipeline is named"),
        ("[", [], "is no TOML"),
        ('pipelin = "x"', [], "holds pipelin; there are"),
        ('pipeline = "nowhere/at/all"', [], "nowhere/at/all"),
        ('pipeline = "x"\n[training]\nstep = 5', [], "step"),
        ('pipeline = "x"', ["--turns", "0"], "turns is 0"),
    ],
)
def test_the_commands_errors(tmp_path, command, text, arguments, message):
    config = tmp_path / "train.toml"
    config.write_text(text)
    result = command(config, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
