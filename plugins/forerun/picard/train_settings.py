"""What `forerun picard train` was asked for: a TOML file, options, or both.

pipeline = "path or repository"
out = "pcm"
cache = "trajectories"      # optional: keeps what was sampled
device = "cpu"

[call]                      # arguments of the pipeline's call; a list is gone through, item by item
prompt = ["a cat", "a dog"]
guidance_scale = 7.5

[training]                  # see forerun.picard.training.Training
steps = 50
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """Choices of one training; `training` and `call` are checked by those who take them.

    Raises:
        ValueError: No pipeline is named.
    """

    pipeline: str = ""
    out: str = "pcm"
    cache: str | None = None
    device: str = "cpu"
    call: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ValueError("no pipeline is named: give --pipeline PATH, or pipeline = … in the configuration")

    @classmethod
    def read(cls, config: Path | None, options: dict[str, Any]) -> TrainSettings:
        """A configuration file, and options that win over it; options that are None were not given.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no TOML, or holds an unknown key.
        """
        found: dict[str, Any] = {}
        if config is not None:
            try:
                found = tomllib.loads(config.read_text())
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{config} is no TOML: {error}") from error
        names = {item.name for item in fields(cls)}
        unknown = found.keys() - names
        if unknown:
            raise ValueError(f"{config} holds {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
        given = {name: value for name, value in options.items() if value is not None}
        training = {**found.get("training", {}), **given.pop("training", {})}
        call = {**found.get("call", {}), **given.pop("call", {})}
        return cls(**{**found, **given, "training": training, "call": call})
