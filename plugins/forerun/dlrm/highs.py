"""HiGHS (Huangfu & Hall, 2018), silent."""

from __future__ import annotations

import highspy

__all__ = ["solver"]


def solver(**options: float) -> highspy.Highs:
    """A solver without a model that prints nothing, with options of HiGHS by name."""
    made = highspy.Highs()  # type: ignore[no-untyped-call]
    made.setOptionValue("output_flag", False)
    for name, value in options.items():
        made.setOptionValue(name, value)
    return made
