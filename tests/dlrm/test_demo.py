"""The demo's section, of what the example wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forerun.dlrm import demo


def test_the_section_shows_what_the_example_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"ranks": 8, "planner": "forerun", "rating": 4.07, "bound": 4.07, "gap": 0.0, "seconds": 2.25}

    def wrote(name: str, out: Path, progress: object) -> None:
        assert Path("examples", name).is_file()
        (out / "dlrm.json").write_text(json.dumps([row]))
        (out / "loads.png").write_bytes(b"picture")

    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(demo, "run_example", wrote)
    section = demo.run(print)
    assert section.tables[0].rows == [("8", "forerun", "4.0700", "4.0700", "0.00%", "2.25")]
    assert section.pictures[0].png == b"picture"
