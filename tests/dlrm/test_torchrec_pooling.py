"""Pooling factors measured over real `KeyedJaggedTensor`s: the figures, whose they are, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner import ParameterConstraints
from torchrec_models import SHARDERS, small

from forerun.dlrm.torchrec import DLRMPlanner
from forerun.dlrm.torchrec_pooling import constraints_from, measure


def jagged(lengths: dict[str, list[int]], *, weighted: bool = False) -> KeyedJaggedTensor:
    """A batch whose samples have so many ids."""
    counts = torch.tensor([count for feature in lengths.values() for count in feature], dtype=torch.int64)
    values = torch.arange(int(counts.sum()))
    weights = torch.ones(len(values)) if weighted else None
    return KeyedJaggedTensor(keys=list(lengths), values=values, lengths=counts, weights=weights)


def bags(**features: list[str]) -> torch.nn.Module:
    """A model with tables of these features."""
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=8, num_embeddings=10, feature_names=names)
        for name, names in features.items()
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))


_LENGTHS = st.lists(st.integers(0, 5), min_size=4, max_size=4)


@settings(max_examples=50)
@given(st.lists(st.fixed_dictionaries({"a": _LENGTHS, "b": _LENGTHS}), min_size=1, max_size=4))
def test_a_factor_is_the_mean_of_all_lengths(batches: list[dict[str, list[int]]]) -> None:
    made = constraints_from([jagged(batch) for batch in batches], bags(t=["b", "a"]))
    for feature, factor in zip("ba", made["t"].pooling_factors, strict=True):
        lengths = [length for batch in batches for length in batch[feature]]
        assert factor == pytest.approx(sum(lengths) / len(lengths))
        assert type(factor) is float


def test_the_order_is_the_tables() -> None:
    batch = jagged({"a": [1, 1], "b": [2, 4], "c": [0, 0]})
    made = constraints_from([batch], bags(t=["c", "a", "b"], u=["b"], v=["b", "a"]))
    assert {name: it.pooling_factors for name, it in made.items()} == {"t": [0, 1, 3], "u": [3], "v": [3, 1]}
    assert all(it.batch_sizes is None and not it.is_weighted for it in made.values())


@dataclass
class Sampled:
    label: torch.Tensor
    inputs: Any


def test_tensors_are_found_wherever_they_are() -> None:
    plain, heavy = jagged({"a": [1, 3]}), jagged({"b": [4, 0]}, weighted=True)
    nested = [
        Sampled(torch.zeros(2), {"sparse": (plain, [heavy])}),
        (Batch(torch.zeros(2, 13), plain, torch.zeros(2)), heavy),
    ]
    made = constraints_from(nested, bags(t=["a"], u=["b"], v=["a", "b"]))
    assert [it.pooling_factors for it in made.values()] == [[2.0], [2.0], [2.0, 2.0]]
    assert [it.is_weighted for it in made.values()] == [False, True, True]


def test_a_loader_is_read_no_further_than_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader([jagged({"a": [count]}) for count in range(10)], batch_size=None)
    assert measure(loader, limit=4).features["a"].ids == 0 + 1 + 2 + 3
    assert caplog.text == ""
    running = iter(loader)
    measured = measure(running, limit=4)
    assert measured.batches == 4
    assert "took 4 batches off an iterator" in caplog.text
    assert next(running).values().numel() == 4


def test_batches_may_be_empty_and_features_missing_from_some() -> None:
    batches = [jagged({"a": [], "b": []}), jagged({"a": [4, 2]}), jagged({"b": [1, 0], "a": [0, 0]})]
    made = constraints_from(batches, bags(t=["a", "b"]))
    assert made["t"].pooling_factors == [1.5, 0.5]


def test_features_with_batches_of_their_own() -> None:
    def batch(first: int, second: int) -> KeyedJaggedTensor:
        lengths = torch.tensor([2] * first + [3] * second)
        return KeyedJaggedTensor(
            keys=["a", "b"],
            values=torch.arange(int(lengths.sum())),
            lengths=lengths,
            stride_per_key_per_rank=[[first], [second]],
            inverse_indices=(["a", "b"], torch.zeros(2, 8, dtype=torch.int64)),
        )

    made = constraints_from([batch(2, 8), batch(4, 8)], bags(t=["b", "a"], u=["a"]))
    assert (made["t"].pooling_factors, made["t"].batch_sizes) == ([3.0, 2.0], [8, 3])
    assert (made["u"].pooling_factors, made["u"].batch_sizes) == ([2.0], [3])
    own = {"u": ParameterConstraints(num_poolings=[0.5])}
    assert constraints_from([batch(2, 8)], bags(u=["a"]), own)["u"].batch_sizes is None


def test_what_a_user_set_stays() -> None:
    own = {
        "t": ParameterConstraints(sharding_types=["row_wise"], min_partition=4),
        "u": ParameterConstraints(pooling_factors=[7.0], is_weighted=True),
        "elsewhere": ParameterConstraints(),
    }
    batch = jagged({"a": [3, 3]})
    made = constraints_from([batch], bags(t=["a"], u=["absent"]), own)
    assert made["t"] == ParameterConstraints(sharding_types=["row_wise"], min_partition=4, pooling_factors=[3.0])
    assert made["u"] == own["u"]
    assert made["elsewhere"] is own["elsewhere"]
    assert own["t"].pooling_factors == [1.0]


def test_tables_may_be_configurations_or_sequences() -> None:
    batch = jagged({"a": [3, 3]})
    configs = [EmbeddingConfig(name="t", embedding_dim=8, num_embeddings=10, feature_names=["a"])]
    assert constraints_from([batch], configs)["t"].pooling_factors == [3.0]
    module = EmbeddingCollection(tables=configs, device=torch.device("meta"))
    assert constraints_from([batch], module)["t"].pooling_factors == [3.0]


def test_what_is_refused_says_what_to_do() -> None:
    batch = jagged({"clicks": [1, 2]})
    refused: list[tuple[type[Exception], str, Any, Any]] = [
        (TypeError, "batches is one KeyedJaggedTensor", batch, bags(t=["clicks"])),
        (TypeError, "batch 0 is a Tensor without a KeyedJaggedTensor", (torch.zeros(2), batch), bags(t=["clicks"])),
        (TypeError, "batches is one Batch", Batch(torch.zeros(2), batch, torch.zeros(2)), bags(t=["clicks"])),
        (ValueError, "there is no batch", iter([]), bags(t=["clicks"])),
        (ValueError, "not one sample", [jagged({"clicks": []})], bags(t=["clicks"])),
        (ValueError, "2 features .*'click' of table 't', 'x' of table 't'; did you mean 'clicks'", [batch], None),
        (ValueError, "no embedding table", [batch], torch.nn.Linear(1, 1)),
    ]
    for kind, told, batches, module in refused:
        with pytest.raises(kind, match=told):
            constraints_from(batches, module or bags(t=["click", "x"]))
    with pytest.raises(ValueError, match="limit=0"):
        constraints_from([batch], bags(t=["clicks"]), limit=0)
    twice = torch.nn.ModuleList([bags(t=["clicks"]), bags(t=["clicks", "other"])])
    with pytest.raises(ValueError, match="two tables are called 't'"):
        constraints_from([batch], twice)


def test_the_planner_takes_them_without_its_warning() -> None:
    module, arguments = small(2)
    batch = jagged({f"f{i}": [count, count] for i, count in enumerate([1, 5, 2, 9])})
    planner = DLRMPlanner(**{**arguments, "constraints": constraints_from([batch], module)})
    given = DLRMPlanner(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planner.plan(module, SHARDERS)
        given.plan(module, SHARDERS)
    assert planner.report.rating == given.report.rating
    with pytest.warns(UserWarning, match="no table has pooling factors"):
        DLRMPlanner(**{**arguments, "constraints": None}).plan(module, SHARDERS)
