"""torchrec's DLRM over the ranks of a process group, by whatever plan: the same weights, steps and answers for all.

Tables are model-parallel and updated in the backward pass; the MLPs, and the tables that a plan replicates, are
data-parallel. Adagrad and SGD are the same element for element on every part, so that a plan changes no result but by
the order of additions.

Source: Deep Learning Recommendation Model, arXiv 1906.00091, sections 2 and 3.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from click_logs import Batch, Table
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.models.dlrm import DLRM
from torchrec.optim.optimizers import in_backward_optimizer_filter

__all__ = ["Optimizer", "Piece", "Trained", "build", "fill", "pieces", "sharded"]

_CPU = torch.device("cpu")
_ROWS = 65_536  # of a table that are drawn at a time


class Optimizer(NamedTuple):
    """What updates every parameter; a class that torchrec also knows as a fused one."""

    kind: type[torch.optim.Optimizer] = torch.optim.Adagrad
    settings: tuple[tuple[str, float], ...] = (("lr", 0.02), ("eps", 1e-8))


class Trained(NamedTuple):
    """A model and what updates its data-parallel part."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> Tensor:
        """Trains on a rank's share of a batch; the mean loss `[]` before the step."""
        dense, features, labels = self._tensors(batch)
        self.optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(self.model(dense, features).squeeze(-1), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """`[B]` scores of a rank's share of a batch."""
        dense, features, _ = self._tensors(batch)
        scores: Tensor = self.model(dense, features).squeeze(-1)
        return scores

    def _tensors(self, batch: Batch) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
        names = [f"f{place}" for place in range(len(batch.lengths))]
        lengths = torch.from_numpy(batch.lengths).flatten()
        features = KeyedJaggedTensor.from_lengths_sync(names, torch.from_numpy(batch.ids), lengths)
        return torch.from_numpy(batch.dense), features, torch.from_numpy(batch.labels)


def build(tables: Sequence[Table], columns: int, dim: int, width: int, device: str = "meta") -> DLRM:
    """A DLRM whose tables have no memory yet, to be planned and sharded.

    Args:
        tables: Table i serves feature `f{i}`.
        columns: Dense features.
        dim: Of every embedding.
        width: Of the MLPs' hidden layers.
        device: Of the tables: "meta" has no memory.
    """
    configs = [
        EmbeddingBagConfig(name=table.name, embedding_dim=dim, num_embeddings=table.rows, feature_names=[f"f{place}"])
        for place, table in enumerate(tables)
    ]
    return DLRM(
        EmbeddingBagCollection(tables=configs, device=torch.device(device)),
        dense_in_features=columns,
        dense_arch_layer_sizes=[width, dim],
        over_arch_layer_sizes=[width, width, 1],
        dense_device=_CPU,
    )


def sharded(model: DLRM, plan: Any, sharders: Sequence[Any], optimizer: Optimizer, seed: int = 0) -> Trained:
    """The model over all ranks of the default group, its weights those of `fill`."""
    _apply_optimizer_in_backward(optimizer.kind, model.sparse_arch.parameters(), dict(optimizer.settings))
    parallel = DistributedModelParallel(
        model,
        device=_CPU,
        plan=plan,
        sharders=list(sharders),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
    )
    fill(parallel, seed)
    rest = [parameter for _, parameter in in_backward_optimizer_filter(parallel.named_parameters())]
    return Trained(parallel, optimizer.kind(rest, **dict(optimizer.settings)))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Sets every weight by its name, its place and the seed, however the model is sharded."""
    for name, part, whole, row, column in pieces(model):
        limit = (whole[0] if ".embedding_bags." in name else whole[-1]) ** -0.5
        last = row + part.shape[0]
        for first in range(row - row % _ROWS, last, _ROWS):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {first}".encode()))
            drawn = torch.empty(min(_ROWS, whole[0] - first), *whole[1:]).uniform_(-limit, limit, generator=generator)
            begin, end = max(first, row), min(first + _ROWS, last)
            rows = drawn[begin - first : end - first]
            part[begin - row : end - row] = rows if rows.ndim == 1 else rows[:, column : column + part.shape[1]]


class Piece(NamedTuple):
    """What a rank holds of a weight, as a view of it."""

    name: str  # in the unsharded model
    part: Tensor  # [rows, columns], or [rows] of a bias
    whole: tuple[int, ...]  # the weight's shape
    row: int  # where the part begins
    column: int


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Every shard on this rank, and whole what is not sharded."""
    for name, weight in model.state_dict().items():
        if not isinstance(weight, ShardedTensor):
            yield Piece(name, weight.detach(), tuple(weight.shape), 0, 0)
            continue
        for shard in weight.local_shards():
            row, column = shard.metadata.shard_offsets
            yield Piece(name, shard.tensor.detach(), tuple(weight.size()), row, column)
