"""Euler steps of x' = a x: the sampler whose Picard iterates are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from forerun.picard.stopping import Stopping
from forerun.picard.window import Window


class Euler:
    """x_{n+1} = x_n + output, the output being z x_n."""

    dtype = None

    def fork(self) -> Euler:
        return Euler()

    def scale(self, sample: Tensor, point: int) -> Tensor:
        return sample

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample + output


class Remembering:
    """A two-step method, clipped, with noise: history, a nonlinearity and draws that forks have to repeat."""

    dtype = None

    def __init__(self, point: int = 0, last: Tensor | None = None) -> None:
        self.point, self.last = point, last

    def fork(self) -> Remembering:
        return Remembering(self.point, self.last)

    def scale(self, sample: Tensor, point: int) -> Tensor:
        return sample / (1 + point)

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        last = output if self.last is None else self.last
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(self.point), dtype=sample.dtype)
        self.point, self.last = self.point + 1, output
        return (0.9 * sample + 0.3 * output - 0.1 * last + 0.1 * noise).clamp(-1.5, 1.5)


def picard_iterate(z: float, steps: int, sweeps: int) -> Tensor:
    """`[steps + 1]` the closed form of the k-th Picard iterate from a constant start: sum_{i<=min(k,n)} C(n,i) z^i."""
    n = torch.arange(steps + 1, dtype=torch.float64)
    total, term = torch.ones_like(n), torch.ones_like(n)
    for i in range(1, sweeps + 1):
        term = term * (n - i + 1).clamp(min=0) / i * z
        total = total + term
    return total


def solve(window: Window, model: object) -> Tensor:
    """Runs a window to its end with `model(inputs [W, B, ...], points)`."""
    for _ in range(window.points + 1):
        if window.done:
            return window.frontier
        window.update(model(window.inputs, window.asked))
    raise AssertionError("a window needs at most T rounds")


def constant_start(z: float, steps: int, tolerance: float) -> Window:
    guess = torch.ones(steps + 1, 1, 1, dtype=torch.float64)
    stopping = Stopping(tolerance)
    return Window(Euler(), guess[0], steps, stopping, acceleration="none", guess=guess, alone=False)
