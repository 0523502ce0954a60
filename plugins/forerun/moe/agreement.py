"""All ranks go on, or none does."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["agree"]


def agree(problem: str | None, told: str, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank if one of them cannot go on, or was told something else; all call it.

    Args:
        problem: Why this rank cannot; None: it can.
        told: What this rank was told to do.
        group: Of the ranks; None: all.

    Raises:
        ValueError: This rank's problem, or another's with its number in the group.
    """
    answers: list[tuple[str | None, str]] = [(None, "")] * dist.get_world_size(group)
    dist.all_gather_object(answers, (problem, told), group=group)
    if problem is not None:
        raise ValueError(problem)
    for rank, (other, _) in enumerate(answers):
        if other is not None:
            raise ValueError(f"rank {rank}: {other}")
    if len({what for _, what in answers}) > 1:
        raise ValueError("ranks were given different plans or options: give all of them the same")
