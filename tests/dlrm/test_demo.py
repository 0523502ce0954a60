"""The demo's section, of what the example wrote."""

from __future__ import annotations

import json
from pathlib import Path

from forerun.dlrm import demo


def test_the_section_shows_what_the_example_wrote(tmp_path: Path) -> None:
    row = {"ranks": 8, "planner": "forerun", "rating": 4.07, "bound": 4.07, "gap": 0.0, "seconds": 2.25}

    (tmp_path / "dlrm.json").write_text(json.dumps([row]))
    (tmp_path / "loads.png").write_bytes(b"picture")
    section = demo.section(tmp_path)
    assert section.tables[0].rows == [("8", "forerun", "4.0700", "4.0700", "0.00%", "2.25")]
    assert section.pictures[0].png == b"picture"
