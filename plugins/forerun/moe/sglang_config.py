"""The section of FORERUN_SGLANG that turns Speculative MoE on, and what each of its keys means:

    {"speculative_moe": {"plan": "plan.safetensors"}}

    plan      null   path of a plan file, of `forerun moe plan`; null: experts stay where they are
    exact     false  a row per (token, expert) comes back and is summed in the order of the router's answer, wherever
                     experts lie; false: a sum per rank comes back, fewer bytes
    shuffle   true   tokens go where the plan expects their experts, under data-parallel attention requests; false:
                     tokens are split in their order, requests as SGLang balances them
    choose    true   a layer takes stock's way for a batch that it is expected to be sooner for; false: never
    trial     8      so many batches of each size go each way before the one that was sooner is kept, where a layer is
                     expected to gain; 0: what is expected is done
    watch     0      after so many batches the plan's file is looked at, and experts move where it has changed; 0: never

What the section asks for is checked before SGLang is asked for anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["SECTION", "Section"]

SECTION = "speculative_moe"


@dataclass(frozen=True)
class Section:
    """What the configuration asks for.

    Raises:
        ValueError: A value is of another type.
    """

    plan: str | None = None
    exact: bool = False
    shuffle: bool = True
    choose: bool = True
    trial: int = 8
    watch: int = 0

    def __post_init__(self) -> None:
        for name in ("exact", "shuffle", "choose"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{SECTION}: {name} is {getattr(self, name)!r}; expected true or false")
        if self.plan is not None and not isinstance(self.plan, str):
            raise ValueError(f"{SECTION}: plan is {self.plan!r}; expected the path of a plan file, or null")
        for name in ("trial", "watch"):
            given = getattr(self, name)
            if type(given) is not int or given < 0:
                raise ValueError(f"{SECTION}: {name} is {given!r}; expected a number of batches, 0 or more")
        if self.watch and self.plan is None:
            raise ValueError(f"{SECTION}: watch is {self.watch} without a plan; expected the path of a plan file too")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Section:
        """Reads the section.

        Raises:
            ValueError: It has keys that are not known, or values of another type.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{SECTION} has {', '.join(unknown)}; expected none but {', '.join(known)}")
        return cls(**given)
