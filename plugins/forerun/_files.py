"""Files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file by another whole one.

    Raises:
        OSError: The disk does not take it; what was there before stays.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")  # other processes may write it too
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
