"""Noise levels of the points, and what they say about the model's answer before the model is asked.

A model's answer is tied to the clean image by `clean = keep * sample + gain * output`. If clean data were Gaussian with
variance s^2, the best denoiser would be linear in the sample, with slope `alpha s^2 / (alpha^2 s^2 + sigma^2)`. That
slope is a far better first guess of how the answer moves with the sample than the zero of plain Picard iteration.

Source: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, eq. 7 and appendix B.6 (the
linear denoiser and the data's standard deviation of 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["DATA_VARIANCE", "NoiseLevels"]

# The square of EDM's standard deviation of images in [-1, 1] and of latents scaled for diffusion.
DATA_VARIANCE = 0.25  # what `data_variance` is unless a user says otherwise

_TRACE = 0.02  # of a sample's variance


@dataclass(frozen=True)
class NoiseLevels:
    """Per point `[T]`: `sample = alpha * clean + sigma * noise`, `clean = keep * sample + gain * output`."""

    alpha: Tensor  # share of the clean image in the sample
    sigma: Tensor  # standard deviation of the noise in the sample
    keep: Tensor  # share of the sample in the clean image
    gain: Tensor  # share of the model's output in the clean image
    data_variance: float = DATA_VARIANCE  # of a clean sample's elements, given the conditioning

    @cached_property
    def denoiser_slope(self) -> Tensor:
        """`[T]` derivative of the clean image with respect to the sample, for Gaussian data."""
        return self.alpha * self.data_variance / (self.alpha**2 * self.data_variance + self.sigma**2)

    @cached_property
    def output_slope(self) -> Tensor:
        """`[T]` derivative of the model's output with respect to the sample, for Gaussian data."""
        return self._output_slope(self.denoiser_slope)

    @cached_property
    def slope_bounds(self) -> tuple[Tensor, Tensor]:
        """`[T]`, `[T]` lowest and highest credible output slope.

        From a denoiser that copies the sample to one that ignores it, and a fifth beyond: a trained one overshoots.
        """
        copies = self._output_slope(1 / self.alpha)
        ignores = self._output_slope(torch.zeros_like(self.alpha))
        beyond = copies + 1.2 * (ignores - copies)
        return torch.minimum(beyond, copies), torch.maximum(beyond, copies)

    @cached_property
    def size(self) -> Tensor:
        """`[T + 1]` root mean square of a sample at each point and at the end, for Gaussian data."""
        return self.size_of(self.data_variance)

    def size_of(self, variance: float) -> Tensor:
        """`[T + 1]` the same for data of another variance."""
        end = torch.full_like(self.alpha[:1], variance)
        return torch.cat([self.alpha**2 * variance + self.sigma**2, end]).sqrt()

    @property
    def from_noise(self) -> bool:
        """Whether the first sample is noise but for a trace, as it is not where an image is the start."""
        return bool(self.alpha[0] ** 2 * DATA_VARIANCE <= _TRACE * self.size_of(DATA_VARIANCE)[0] ** 2)

    def _output_slope(self, denoiser_slope: Tensor) -> Tensor:
        slope = (denoiser_slope - self.keep) / self.gain
        return torch.where(slope.isfinite(), slope, 0.0)  # no noise, no signal: the output says nothing there

    def extrapolate(
        self, sample: Tensor, point: int, anchor: int, anchor_sample: Tensor, anchor_output: Tensor
    ) -> Tensor:
        """`[B, ...]` output to expect at `point` for `sample`, from the answer at the earlier point `anchor`.

        What Gaussian data would give whose mean is the one that explains the anchor's answer.
        """
        of_sample, of_anchor, of_output = self._extrapolation(point, anchor)
        return of_sample * sample + of_anchor * anchor_sample + of_output * anchor_output

    def _extrapolation(self, point: int, anchor: int) -> tuple[float, float, float]:
        slope = self.denoiser_slope
        weight = (1 - slope[point] * self.alpha[point]) / (1 - slope[anchor] * self.alpha[anchor])
        factors = torch.stack(
            [slope[point] - self.keep[point], weight * (self.keep[anchor] - slope[anchor]), weight * self.gain[anchor]]
        )
        factors = factors / self.gain[point]
        if not bool(factors.isfinite().all()):
            return 0.0, 0.0, 1.0  # the answer held as it is
        of_sample, of_anchor, of_output = factors.tolist()
        return of_sample, of_anchor, of_output
