"""Which model a profile or a plan is of, and what is said where it meets another one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MOST_EXPERTS", "MOST_LAYERS", "MOST_TOKENS", "Identity"]

MOST_LAYERS, MOST_TOKENS, MOST_EXPERTS = 1 << 14, 1 << 32, 1 << 15  # what one 64-bit number holds of each


@dataclass(frozen=True)
class Identity:
    """A mixture-of-experts model, as far as routing goes.

    Args:
        model: Its name or path.
        layers: Numbers of its MoE layers in the model, rising.
        experts: E, routed experts of a layer.
        top_k: Experts of a token.

    Raises:
        ValueError: No such model can be.
    """

    model: str
    layers: tuple[int, ...]
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (*self.layers, self.experts, self.top_k))
        if not isinstance(self.model, str) or not whole:
            raise ValueError(f"a model is named by text and counted in whole numbers; {self} is not")
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not rising or self.layers[0] < 0 or len(self.layers) > MOST_LAYERS:
            raise ValueError(f"layers are {self.layers}; expected 1 to {MOST_LAYERS} rising numbers from 0 on")
        if not 1 <= self.top_k <= self.experts <= MOST_EXPERTS:
            raise ValueError(f"top {self.top_k} of {self.experts} experts: expected 1 <= k <= E <= {MOST_EXPERTS}")

    @property
    def hash(self) -> str:
        """The same for the same model."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def refuse_other(self, other: Identity, what: str) -> None:
        """Raises unless both are of the same shape and name.

        Raises:
            ValueError: `what`, which is of this model, meets another one; both are named.
        """
        if self != other:
            raise ValueError(f"{what} is of {self}, not of {other}: make one of that model")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers), "hash": self.hash}

    @classmethod
    def from_json(cls, fields: Any) -> Identity:
        """Reads what `as_json` made.

        Raises:
            ValueError: It did not, or the hash is another's.
        """
        try:
            named = cls(fields["model"], tuple(fields["layers"]), fields["experts"], fields["top_k"])
            given = fields["hash"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no model is named: {error!r}") from error
        if named.hash != given:
            raise ValueError(f"the hash of {named} is {named.hash[:12]}…, not {str(given)[:12]}…")
        return named

    def __str__(self) -> str:
        count = len(self.layers)
        return f"{self.model!r} ({count} MoE layer{'s' * (count > 1)}, top {self.top_k} of {self.experts} experts)"
