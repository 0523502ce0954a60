"""Files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_together", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file by another whole one.

    Raises:
        OSError: The disk does not take it; what was there before stays.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Replaces files by others, in that order, once the disk holds all of them.

    Raises:
        OSError: The disk does not take them; what was there before stays.
    """
    # Other processes may write them too.
    unfinished = {path: path.with_name(f"{path.name}.{os.getpid()}.unfinished") for path in contents}
    try:
        for path, content in contents.items():
            with unfinished[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, staged in unfinished.items():
            os.replace(staged, path)
    finally:
        for staged in unfinished.values():
            staged.unlink(missing_ok=True)
