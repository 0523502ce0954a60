"""How far a set of samples is from real digits: the Fréchet distance of a small classifier's features.

The FID of pictures takes features of Inception; on 8x8 digits they mean nothing, so the classifier is trained here, in
seconds. Distances are comparable among sets of one size, and with no published FID.

Source: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv 1706.08500, eq. 6.
"""

from __future__ import annotations

from typing import Self

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["FEATURES", "DigitFeatures", "frechet_distance"]

FEATURES = 32  # F, of a digit
_HELD_OUT = 180


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Squared distance of the Gaussians with two sets' means and covariances.

        |mean - mean'|^2 + trace(C + C' - 2 (C C')^(1/2))

    Args:
        left: `[n, F]` features, in any unit.
        right: `[m, F]` features, in the same unit.

    Source: arXiv 1706.08500, eq. 6.
    """
    left, right = left.double(), right.double()
    spread, other = torch.cov(left.T), torch.cov(right.T)
    root = _square_root(spread)
    # (C C')^(1/2) has the trace of the root of C^(1/2) C' C^(1/2), which is symmetric.
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((left.mean(0) - right.mean(0)).square().sum() + spread.trace() + other.trace() - 2 * shared)


def _square_root(matrix: Tensor) -> Tensor:
    """Of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class DigitFeatures(nn.Module):
    """A classifier of digits; what its last layer sees are a picture's features.

    Attributes:
        accuracy: Share of the held-out digits that it names right.
        real: `[1797, F]` features of all real digits.
    """

    accuracy: float
    real: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, FEATURES),
            nn.ReLU(),
        )
        self.last = nn.Linear(FEATURES, 10)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """`[B, F]` of `[B, 1, 8, 8]` samples, cut to [-1, 1] as the pipeline cuts them to make a picture."""
        return self.features(samples.float().cpu().clamp(-1, 1))

    @torch.no_grad()
    def distance(self, samples: Tensor) -> float:
        """Fréchet distance of `[B, 1, 8, 8]` samples to all real digits."""
        return frechet_distance(self(samples), self.real)

    @classmethod
    def trained(cls, updates: int = 600, batch: int = 128) -> Self:
        """Trains on scikit-learn's digits but for 180; the same every time."""
        digits = load_digits()
        pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        names = torch.tensor(digits.target)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        held_out, training = order[:_HELD_OUT], order[_HELD_OUT:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = cls()
            optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=1e-2)
            for _ in range(updates):
                rows = training[torch.randint(0, len(training), (batch,))]
                loss = nn.functional.cross_entropy(made.last(made.features(pictures[rows])), names[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            named = made.last(made(pictures[held_out])).argmax(1)
        made.accuracy = float((named == names[held_out]).float().mean())
        made.real = made(pictures)
        return made.eval()
