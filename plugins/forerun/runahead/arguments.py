"""The user's vLLM arguments: what they say, and what they may not."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_arguments", "value_of"]

# What each engine is told by us, and what would make its server another one than the one we ask.
_OURS = (
    "--host",
    "--port",
    "--kv-transfer-config",
    "--model",
    "--uds",
    "--ssl-keyfile",
    "--ssl-certfile",
    "--root-path",
)
_ONE = ("--data-parallel-size", "-dp", "--pipeline-parallel-size", "-pp", "--api-server-count", "-asc")


def check_arguments(arguments: Sequence[str]) -> None:
    """Returns if engines of a chain can have them.

    Raises:
        ValueError: One contradicts what the engines are told, or makes more of an engine than one.
    """
    for name in (_name(argument.partition("=")[0].partition(".")[0]) for argument in arguments):
        if name in _OURS:
            raise ValueError(f"{name} is set for each engine: leave it out of the vLLM arguments")
    for name in _ONE:
        if (value := value_of(arguments, name)) not in (None, "1"):
            raise ValueError(f"{name} is {value}; an engine of a chain has 1")


def value_of(arguments: Sequence[str], *names: str) -> str | None:
    """What an option is set to, the last time; None: it is not there."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if _name(name) in names:
            found = value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return found


def _name(text: str) -> str:
    """vLLM takes underscores for dashes."""
    return text.replace("_", "-") if text.startswith("--") else text
