"""What a planner is given, looked at before torchrec does: it takes most mistakes in silence."""

from __future__ import annotations

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forerun_adapters import torchrec as host

__all__ = ["check_constraints", "check_group", "check_objective", "check_tables"]


def check_constraints(constraints: Mapping[str, Any] | None) -> None:
    """Returns if every number of the constraints is one.

    Raises:
        PlannerError: A pooling factor, number of poolings or batch size is negative or not finite, or they are not
            equally many.
    """
    for table, constraint in (constraints or {}).items():
        lengths = {}
        for name in ("pooling_factors", "num_poolings", "batch_sizes"):
            values = getattr(constraint, name, None)
            if values is None or len(values) == 0:
                continue
            lengths[name] = len(values)
            if wrong := [value for value in values if not math.isfinite(value) or value < 0]:
                raise host.planner_error(
                    "INPUT_VALIDATION",
                    f"constraints of table {table!r}: {name} has {wrong[0]}; expected finite numbers, 0 or more",
                )
        if len(set(lengths.values())) > 1:
            raise host.planner_error(
                "INPUT_VALIDATION",
                f"constraints of table {table!r}: {lengths} are numbers of features and must be equal",
            )


def check_objective(objective: str, known: Iterable[str], model: Any, enumerator: Any) -> None:
    """Returns if plans can be rated by an objective.

    Raises:
        PlannerError: It is none, or a user's own performance model or enumerator decides what it decides.
    """
    if objective not in known:
        raise host.planner_error("INPUT_VALIDATION", f"objective={objective!r}: expected one of {', '.join(known)}")
    if objective == "corrected" and (model is not None or enumerator is not None):
        own = "performance_model" if model is not None else "enumerator"
        raise host.planner_error(
            "INPUT_VALIDATION", f"objective='corrected' says what costs count, and so does your {own}: give one of them"
        )


def check_tables(options: Sequence[Any], constraints: Mapping[str, Any] | None, *, strict: bool) -> None:
    """Warns about constraints that reach no table or several, and pooling factors that nobody gave.

    Raises:
        PlannerError: `strict`, and a constraint names no table, or one that several modules have.
    """
    constraints = constraints or {}
    paths = Counter(name for name, _ in {(option.name, option.path) for option in options})
    # A constraint for another group of devices leaves its table out of the options.
    if not paths:
        _complain("no sharder finds a table in the module: there is nothing to plan", strict)
        return
    if unknown := [n for n, c in constraints.items() if n not in paths and not getattr(c, "device_group", None)]:
        close = difflib.get_close_matches(unknown[0], paths, n=1)
        _complain(
            f"constraints name {len(unknown)} tables that no sharder finds in the module, first {unknown[0]!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; it has {sorted(paths)[:5]} …"),
            strict,
        )
    for name in [n for n, count in paths.items() if count > 1 and n in constraints]:
        _complain(f"constraints of table {name!r} reach {paths[name]} tables of that name, in as many modules", strict)
    if all(host.is_default_pooling(constraints.get(name)) for name in paths):
        warnings.warn(
            "no table has pooling factors (ParameterConstraints.pooling_factors): torchrec plans as if every sample "
            "looked up 1 row of each table, and the plan's rating says little about the step's time",
            stacklevel=2,
        )


def check_group(size: int, topology: Any) -> None:
    """Returns if a process group can run plans of a topology: its size is one, or several, of them (2D parallel).

    Raises:
        PlannerError: It cannot.
    """
    if size % topology.world_size:
        raise host.planner_error(
            "INPUT_VALIDATION",
            f"the process group has {size} ranks, the planner's topology {topology.world_size}; give the planner "
            f"Topology(world_size={size}, …)",
        )


def _complain(message: str, strict: bool) -> None:
    if strict:
        raise host.planner_error("INPUT_VALIDATION", message)
    warnings.warn(message, stacklevel=4)
