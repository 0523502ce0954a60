"""A routing profile from what SGLang's own recorder wrote: its expert distribution recorder in the mode `per_token`.

    SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=records python -m sglang.launch_server … \\
        --expert-distribution-recorder-mode per_token
    curl -X POST localhost:30000/start_expert_distribution_record        # requests; then stop_…, dump_…
    forerun moe profile --sglang records/*_0.pt --model PATH --out profile.safetensors

Every tensor-parallel rank writes the same tokens, so rank 0's file, whose name ends with `_0.pt`, is the one to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forerun.moe.identity import Identity
from forerun.moe.profile import Profile, Recorder

__all__ = ["profile_dumps"]


def profile_dumps(
    paths: Sequence[Path], model: str, *, seed: int = 0, progress: Callable[[int], None] = lambda tokens: None
) -> Profile:
    """The profile of the tokens that SGLang recorded.

    Args:
        paths: Files of one model, of rank 0.
        model: Its folder or repository; a profile has its name.
        seed: Of the sample of paths; another one for profiles to be merged.
        progress: Is told how many tokens each batch had.

    Raises:
        OSError: There is no such file.
        ValueError: A file is no such dump, or of another rank, or they have no tokens or are of different models.
    """
    name = Path(model).resolve().name if Path(model).exists() else model
    recorder: Recorder | None = None
    layers: NDArray[Any] = np.zeros(0, np.int64)
    for path in paths:
        told = _load(path)
        for ids, chosen in _batches(path, told):  # [n], [every layer, n, k']
            if recorder is None:
                layers = np.flatnonzero((chosen >= 0).any((1, 2)))
                top_k = int((chosen[layers] >= 0).any((0, 1)).sum())
                identity = Identity(name, tuple(layers.tolist()), _experts(told), top_k)
                recorder = Recorder(identity, seed=seed)
            if len(chosen) <= layers.max():
                raise ValueError(f"{path} has {len(chosen)} layers; expected those of {recorder.identity}")
            experts = chosen[layers][:, :, : recorder.identity.top_k]
            kept = (experts >= 0).all((0, 2))  # padding has no experts
            recorder.add(ids[kept], experts[:, kept])
            progress(int(kept.sum()))
    if recorder is None:
        raise ValueError("no token was recorded: send requests between start_ and dump_expert_distribution_record")
    return recorder.profile()


def _load(path: Path) -> Any:
    try:
        told = torch.load(path, map_location="cpu", weights_only=True)
        told["records"], told["last_physical_to_logical_map"]
    except OSError:
        raise
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(
            f"{path} is no dump of SGLang's recorder in the mode per_token ({type(error).__name__}): start the server "
            "with --expert-distribution-recorder-mode per_token"
        ) from error
    return told


def _experts(told: Any) -> int:
    return int(told["last_physical_to_logical_map"].max()) + 1


def _batches(path: Path, told: Any) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    logical = told["last_physical_to_logical_map"].numpy()  # [layers, places]
    for record in told["records"]:
        if "topk_ids_of_layer" not in record:
            raise ValueError(f"{path} was not recorded in the mode per_token")
        if record.get("rank"):
            raise ValueError(f"{path} is rank {record['rank']}'s; expected rank 0's, whose name ends with _0.pt")
        ids = np.asarray(record["input_ids"], np.int64)
        places = record["topk_ids_of_layer"].numpy().astype(np.int64)[:, : len(ids)]
        there = np.take_along_axis(logical[:, None], np.maximum(places, 0), 2) if places.size else places
        if len(ids) and (places >= 0).any():
            yield ids, np.where(places < 0, -1, there)
