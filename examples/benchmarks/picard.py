"""Sequential, plain and accelerated Picard, and ParaDiGMS on the digits model: rounds, evaluations, seconds, error.

Every base scheduler at T in {25, 50, 100, 250, 1000}; one sample a run. Writes `results/picard.json`
(`picard-cuda.json` with `--device cuda`) and pictures beside it. Rows where parallel sampling loses are there too.
Cells that are not named keep what an earlier run wrote.

    python examples/benchmarks/picard.py [--device cuda] [--steps 25,50] [--schedulers DDIMScheduler]
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import paradigms
import torch
from measurement import comparison, mean, provenance, relative_error, wait
from rich.progress import Progress
from torch import Tensor, nn

from forerun.picard.base_solver import noise_levels
from forerun.picard.diffusers import parallel

_HERE = Path(__file__).parent
_MODEL = _HERE.parent / "assets" / "digits" / "unet"
_STEPS = (25, 50, 100, 250, 1000)
_TOLERANCE = 1e-3
# What the digits model was trained for is epsilon; other outputs are computed from it (`Retargeted`).
_EPSILON = {"prediction_type": "epsilon", "clip_sample": False}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler sde": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "CogVideoXDDIMScheduler": _EPSILON,
    "CogVideoXDPMScheduler": _EPSILON,
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "CosineDPMSolverMultistepScheduler": {"sigma_max": 80.0, "sigma_min": 0.02},
}


class Row(NamedTuple):
    """One scheduler at one number of steps, one way to sample; means over seeds."""

    scheduler: str
    steps: int  # timesteps asked for
    way: str
    seeds: int
    rounds: float  # model calls one after the other
    evaluations: float
    seconds: float
    error: float  # largest relative L2 distance to the sequential sample


class Retargeted(nn.Module):
    """The digits model under another scheduler's noise levels and output, by the exact change of variables."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        signal = diffusers.DDIMScheduler().alphas_cumprod.double()
        self._ratio = ((1 - signal) / signal).sqrt()  # noise over signal, per training timestep
        self._table: dict[float, tuple[float, ...]] = {}

    def follow(self, scheduler: Any) -> None:
        """Makes the model answer what `scheduler` asks, at its timesteps as they are set."""
        levels = noise_levels(scheduler, scheduler.timesteps)
        assert levels is not None
        rows = torch.stack([levels.alpha, levels.sigma, levels.keep, levels.gain], 1).tolist()
        self._table = {float(t): tuple(row) for t, row in zip(scheduler.timesteps, rows, strict=True)}
        solver = type(scheduler).from_config(scheduler.config)
        self._scaled = hasattr(solver, "scale_model_input")

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rows = torch.tensor([self._table[float(t)] for t in timestep.expand(len(sample))], dtype=torch.float64)
        alpha, sigma, keep, gain = rows.to(sample.device).T.reshape(4, -1, 1, 1, 1)
        alpha = alpha.clamp(min=1e-3)  # flow matching starts from pure noise
        if self._scaled:  # EDM's input scaling, for its data variance of 0.25
            sample = sample * (sigma**2 + 0.25).sqrt()
        ratio = (sigma / alpha).flatten().cpu().clamp(float(self._ratio[0]), float(self._ratio[-1]))
        above = torch.searchsorted(self._ratio, ratio).clamp(1, len(self._ratio) - 1)
        low, high = self._ratio[above - 1], self._ratio[above]
        times = (above - 1 + (ratio - low) / (high - low)).to(sample.device, torch.float32)
        norm = (alpha**2 + sigma**2).sqrt()
        noise = self.unet((sample / norm).float(), times).sample
        clean = (sample - sigma * noise) / alpha
        return ((clean - keep * sample) / gain).float()


class Plain(nn.Module):
    """The digits model as it is: a tensor in, a tensor out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def follow(self, scheduler: Any) -> None:
        pass

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep).sample


def scheduler_named(name: str, steps: int) -> Any:
    """The scheduler; with "trailing" timesteps where its own hold one twice, which makes its result not a number."""
    scheduler = getattr(diffusers, name.split()[0])(**_SCHEDULERS[name])
    scheduler.set_timesteps(steps)
    twice = bool((scheduler.timesteps[1:] == scheduler.timesteps[:-1]).any()) and scheduler.order == 1
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing") if twice else scheduler


@torch.no_grad()
def loop(scheduler: Any, model: nn.Module, steps: int, seed: int, device: torch.device) -> tuple[Tensor, float]:
    """The plain sampling loop; the sample and its seconds."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 1, 8, 8, generator=generator).to(device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    seeded = {"generator": generator}
    sample, earlier = start, None
    wait(device)
    began = time.perf_counter()
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = model(scaled, t)
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            before = scheduler.timesteps[i - 1] if i > 0 else None
            sample, earlier = scheduler.step(output, earlier, t, before, sample, **seeded, return_dict=False)
        else:
            sample = scheduler.step(output, t, sample, **_accepted(scheduler, seeded), return_dict=False)[0]
    wait(device)
    return sample, time.perf_counter() - began


def rows_of(name: str, steps: int, seeds: int, unet: nn.Module, device: torch.device) -> Iterator[Row]:
    """Every way to sample with one scheduler at one number of steps."""
    retarget = name.split()[0].startswith(("FlowMatch", "EDM", "Cosine"))
    model: Any = Retargeted(unet) if retarget else Plain(unet)
    base = scheduler_named(name, steps)
    base.set_timesteps(steps)
    model.follow(base)
    calls = len(base.timesteps)
    loop(base, model, 5 if not retarget else steps, 0, device)  # warm-up
    model.follow(base)
    sequential = [loop(base, model, steps, seed, device) for seed in range(seeds)]
    yield Row(name, steps, "sequential", seeds, calls, calls, mean(took for _, took in sequential), 0.0)
    ways = {"plain": "none", "anderson": "anderson", "accelerated": "secant"}
    if steps > 100:
        del ways["anderson"]
    for way, acceleration in ways.items():
        ours = parallel(model, base, tolerance=_TOLERANCE, acceleration=acceleration, check_cost=False)
        results, reports = [], []
        for seed in range(seeds):
            results.append(loop(ours, model, steps, seed, device))
            reports.append(ours.report)
        ours.detach()
        yield Row(
            name,
            steps,
            way,
            seeds,
            mean(report.rounds for report in reports),
            mean(report.evaluations for report in reports),
            mean(took for _, took in results),
            max(relative_error(ours[0], theirs[0]) for ours, theirs in zip(results, sequential, strict=True)),
        )
    peer = {"DDIMScheduler": "DDIMParallelScheduler", "DDPMScheduler": "DDPMParallelScheduler"}.get(name)
    if peer is not None:
        scheduler = getattr(diffusers, peer)(clip_sample=False)
        for tolerance in (0.1, _TOLERANCE):
            yield _paradigms_row(name, steps, scheduler, model, sequential, device, tolerance)


def _paradigms_row(
    name: str, steps: int, scheduler: Any, model: nn.Module, sequential: list, device: torch.device, tolerance: float
) -> Row:
    outcomes, seconds = [], []
    for seed in range(len(sequential)):
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1, 1, 8, 8, generator=generator).to(device)
        began = time.perf_counter()
        outcomes.append(paradigms.sample(model, scheduler, start, generator, tolerance))
        wait(device)
        seconds.append(time.perf_counter() - began)
    return Row(
        name,
        steps,
        f"ParaDiGMS {tolerance:g}",
        len(sequential),
        mean(outcome.rounds for outcome in outcomes),
        mean(outcome.evaluations for outcome in outcomes),
        mean(seconds),
        max(relative_error(outcome.sample, theirs[0]) for outcome, theirs in zip(outcomes, sequential, strict=True)),
    )


def as_result(rows: list[Row], device: torch.device, command: str) -> dict[str, Any]:
    """The file's content: comparisons `ours` against `peer` (a ratio above 1: ours is better), and every row."""
    comparisons = []
    found = {(row.scheduler, row.steps, row.way): row for row in rows}
    for (scheduler, steps, way), row in found.items():
        if way != "accelerated":
            continue
        for peer in ("sequential", "plain", "ParaDiGMS 0.001"):
            other = found.get((scheduler, steps, peer))
            for unit in ("rounds", "seconds"):
                if other is not None:
                    name = f"{scheduler} T={steps}"
                    ours, theirs = getattr(row, unit), getattr(other, unit)
                    comparisons.append(comparison(name, unit, ours, theirs, peer, _TOLERANCE))
    return {
        **provenance(device, ("torch", "diffusers"), command),
        "rows": comparisons,
        "measured": [row._asdict() for row in rows],
    }


def measured_before(path: Path, cells: set[tuple[str, int]]) -> list[Row]:
    """Rows of an earlier run that this one does not measure again."""
    if not path.is_file():
        return []
    rows = [Row(**row) for row in json.loads(path.read_text())["measured"]]
    return [row for row in rows if (row.scheduler, row.steps) not in cells]


def draw(rows: list[Row], path: Path) -> None:
    """Rounds and seconds against T for DDIM, and the ratio to sequential for every scheduler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    rounds, seconds, ratios = figure.subplots(1, 3)
    for axes, unit in ((rounds, "rounds"), (seconds, "seconds")):
        for way in dict.fromkeys(row.way for row in rows if row.scheduler == "DDIMScheduler"):
            line = [row for row in rows if row.scheduler == "DDIMScheduler" and row.way == way]
            axes.loglog([row.steps for row in line], [getattr(row, unit) for row in line], marker="o", label=way)
        axes.set(title=f"DDIM: {unit}", xlabel="T", ylabel=unit)
        axes.legend(fontsize=7)
        axes.grid(visible=True, which="both", alpha=0.2)
    found = {(row.scheduler, row.steps, row.way): row for row in rows}
    for scheduler in dict.fromkeys(row.scheduler for row in rows):
        steps = [row.steps for row in rows if row.scheduler == scheduler and row.way == "accelerated"]
        gains = [found[scheduler, n, "sequential"].seconds / found[scheduler, n, "accelerated"].seconds for n in steps]
        ratios.semilogx(steps, gains, marker=".", label=scheduler.replace("Scheduler", ""))
    ratios.axhline(1.0, color="black", linewidth=1)
    ratios.set(title="seconds, sequential / accelerated (below 1: slower)", xlabel="T")
    ratios.legend(fontsize=5, ncols=2)
    ratios.grid(visible=True, alpha=0.2)
    figure.savefig(path, dpi=110)


def _accepted(scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", default=",".join(map(str, _STEPS)))
    parser.add_argument("--schedulers", default=",".join(_SCHEDULERS))
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torchsde's rounding and numpy's deprecations, hundreds a run
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    unet = diffusers.UNet2DModel.from_pretrained(_MODEL).eval().to(device)
    cells = [(name, int(n)) for n in options.steps.split(",") for name in options.schedulers.split(",")]
    name = "picard" if device.type == "cpu" else f"picard-{device.type}"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measured_before(options.out / f"{name}.json", set(cells))
    with Progress() as progress:
        task = progress.add_task("cells", total=len(cells))
        for scheduler, steps in cells:
            seeds = 32 if (scheduler, steps) == ("DDIMScheduler", 100) else 4 if steps <= 100 else 1
            progress.update(task, description=f"{scheduler} T={steps}")
            rows += rows_of(scheduler, steps, seeds, unet, device)
            progress.advance(task)
            command = " ".join(["python examples/benchmarks/picard.py", *sys.argv[1:]])
            text = json.dumps(as_result(rows, device, command), indent=1)
            (options.out / f"{name}.json").write_text(text + "\n")
    draw(rows, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
