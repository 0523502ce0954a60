"""A routing profile of a transformers model: what its routers choose on texts.

Forward hooks on the routers; nothing of the model is changed, and the hooks are gone afterwards. Models whose layers
have different numbers of experts are not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forerun.moe.identity import Identity
from forerun.moe.profile import Profile, Recorder
from forerun_adapters import transformers as host

__all__ = ["embeddings_of", "identify", "profile_model", "profile_path"]


def identify(model: nn.Module) -> Identity:
    """Which model this is, as far as routing goes.

    Raises:
        ValueError: It has no routers, or routers that differ.
    """
    found = host.routers(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MoE router that forerun knows (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, "
            "DeepSeek-V2, DeepSeek-V3 of transformers 5.19 or later)"
        )
    shapes = {(router.experts, router.top_k) for router in found}
    if len(shapes) > 1:
        raise ValueError(f"{type(model).__name__} has layers of different (experts, top k): {sorted(shapes)}")
    experts, top_k = shapes.pop()
    return Identity(host.name_of(model), tuple(router.layer for router in found), experts, top_k)


@torch.no_grad()
def profile_model(
    model: nn.Module,
    pieces: Iterable[Tensor],
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Profile:
    """Runs the model over tokenised text and counts where its routers send every token.

    Args:
        model: Any that `identify` knows.
        pieces: Token ids, `[length]` each, of at least one token.
        batch: Pieces of equal length that run together.
        seed: Of the sample of paths.
        progress: Is told how many tokens each batch had.

    Raises:
        ValueError: `identify` does not know the model.
        TypeError: A router returns something else than its kind does.
    """
    recorder = Recorder(identify(model), seed=seed)
    found = host.routers(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with host.watched(found) as chosen:
            for ids in _batched(pieces, batch):
                model(ids.to(device), use_cache=False)
                experts = torch.stack([chosen[router.layer] for router in found]).numpy()
                recorder.add(ids.flatten().numpy(), experts)
                progress(ids.numel())
    finally:
        model.train(was_training)
    return recorder.profile()


def profile_path(
    path: str,
    texts: Iterable[str],
    *,
    length: int = 512,
    batch: int = 8,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Profile:
    """The profile of a saved model on texts.

    Args:
        path: Folder or repository of model and tokenizer.
        texts: Each is cut in pieces of its own.
        length: Tokens of a piece.
        batch: Pieces that run together.
        tokens: After about so many the rest is left; None: all.
        device: Such as cpu or cuda.
        dtype: Such as float32 or bfloat16; auto: as saved.
        seed: Of the sample of paths.
        progress: Is told how many tokens each batch had.

    Raises:
        OSError: There is no such model.
        ValueError: It is no MoE model that forerun knows, or there is no text.
    """
    if length < 1 or batch < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"length {length}, batch {batch}, tokens {tokens}: expected 1 or more")
    model, tokenizer = host.load(path, device, dtype)
    pieces = _cut(tokenizer, texts, length)
    if tokens is not None:
        pieces = islice(pieces, -(-tokens // length))
    profile = profile_model(model, pieces, batch=batch, seed=seed, progress=progress)
    if not len(profile.keys):
        raise ValueError("the texts have no token: nothing was counted")
    return profile


def embeddings_of(path: str) -> NDArray[np.float32]:
    """`[V, H]` the input embeddings of a saved model, for `make_plan`."""
    return np.asarray(host.embeddings(path).numpy())


def _cut(tokenizer: Any, texts: Iterable[str], length: int) -> Iterator[Tensor]:
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        yield from ids.split(length) if len(ids) else ()


def _batched(pieces: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """`[n, length]` pieces of equal length together; there is no padding that could be counted."""
    waiting: dict[int, list[Tensor]] = {}
    for piece in pieces:
        same = waiting.setdefault(len(piece), [])
        same.append(piece)
        if len(same) == most:
            yield torch.stack(waiting.pop(len(piece)))
    for same in waiting.values():
        yield torch.stack(same)
