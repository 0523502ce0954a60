"""A model's shape as far as prefill depends on it: layers, bytes of keys and values, arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from forerun.runahead.cost import Cost

__all__ = ["Shape"]

_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers with a gated feed-forward network.

    Args:
        layers: L.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Heads of keys and values: `heads` for MHA, fewer for GQA, 1 for MQA.
        head_size: Of every head.
        intermediate: Width of the feed-forward network.
        element: Bytes of a number in the cache.

    Raises:
        ValueError: A number is below 1.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    element: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; expected 1 or more")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Reads the `config.json` of a Hugging Face decoder.

        Raises:
            ValueError: It lacks a size that is needed, or has a dtype that is none of float32, float16, bfloat16.
        """
        config = config.get("text_config", config)  # the decoder of a multimodal model
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            if dtype not in _BYTES:
                raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_BYTES)}")
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads),
                head_size=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"],
                element=_BYTES[dtype],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the model's config lacks a usable {error}: expected a decoder's config.json") from error

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_size * self.element

    @property
    def _projections(self) -> int:
        return self.hidden * self.head_size * (self.heads + 2 * self.kv_heads)

    @property
    def _weights(self) -> int:
        output = self.hidden * self.head_size * self.heads
        return self._projections + output + 3 * self.hidden * self.intermediate

    @property
    def before(self) -> float:
        """Share of the work linear in tokens that is done before a layer's keys and values are there to be sent."""
        return self._projections / self._weights

    def cost(self, flops: float) -> Cost:
        """The cost at so many floating-point operations a second, a causal kernel taken; embeddings are left out.

        Raises:
            ValueError: `flops` is not above 0.
        """
        if not flops > 0:
            raise ValueError(f"flops is {flops}; expected operations a second, above 0")
        pair = 2 * self.heads * self.head_size * self.layers / flops
        return Cost(0.0, 2 * self._weights * self.layers / flops, 0.0, pair)
