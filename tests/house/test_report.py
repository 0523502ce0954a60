"""The demo's page: it needs nothing beside itself and shows text as text."""

import base64
import re
from html.parser import HTMLParser

import pytest

from forerun.report import Picture, Section, Table, write_page

# One black pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
HOSTILE = "<script>alert('&')</script> \"quoted\""


class References(HTMLParser):
    """Collects what a page points to, and its tags."""

    def __init__(self):
        super().__init__()
        self.targets, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def page_of(tmp_path, *sections):
    return write_page(tmp_path / "new" / "index.html", sections).read_text()


def test_a_page_points_to_nothing_outside(tmp_path):
    page = page_of(tmp_path, Section("title", "text", [Table("t", ["a"], [["1"]])], [Picture("caption", PNG)]))
    references = References()
    references.feed(page)
    assert references.targets == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not {"script", "link", "iframe"} & set(references.tags)
    assert not re.search(r"url\(|@import|https?://", page)


def test_text_is_escaped_everywhere(tmp_path):
    section = Section(HOSTILE, HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE]])], [Picture(HOSTILE, PNG)])
    page = page_of(tmp_path, section)
    references = References()
    references.feed(page)
    assert "script" not in references.tags
    assert page.count("&lt;script&gt;") == 7


def test_paragraphs_rows_and_order_are_kept(tmp_path):
    table = Table("t", ["steps", "rounds"], [["50", "11"], ["100", "12"]])
    page = page_of(tmp_path, Section("first", "one\n\ntwo", [table]), Section("second", ""))
    assert page.count("<p>") == 2
    assert "<tr><td>50</td><td>11</td></tr>\n<tr><td>100</td><td>12</td></tr>" in page
    assert page.index("first") < page.index("second")


def test_a_row_of_the_wrong_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 columns and a row of 1"):
        page_of(tmp_path, Section("s", "", [Table("t", ["a", "b"], [["1"]])]))
    assert list(tmp_path.iterdir()) == []


def test_the_page_says_what_it_ran_on(tmp_path):
    page = page_of(tmp_path)
    assert "cores" in page
    assert "Python 3." in page
