"""The section that turns Speculative MoE on in SGLang: what of it is refused."""

import pytest

from forerun.moe.sglang_config import Section


def test_a_section_says_what_is_asked_for():
    assert Section.read({}) == Section(plan=None, exact=False, shuffle=True, choose=True)
    assert Section.read({"plan": "x", "exact": True}) == Section(plan="x", exact=True)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"plans": "x"}, "speculative_moe has plans; expected none but plan, exact, shuffle, choose, trial, watch"),
        ({"exact": 1}, "exact is 1; expected true or false"),
        ({"watch": 5}, "watch is 5 without a plan"),
        ({"watch": -1, "plan": "x"}, "watch is -1; expected a number of batches, 0 or more"),
        ({"trial": True}, "trial is True; expected a number of batches, 0 or more"),
        ({"plan": 3}, "plan is 3; expected the path of a plan file, or null"),
    ],
)
def test_a_section_that_cannot_be_met_is_refused(section, said):
    with pytest.raises(ValueError, match=said):
        Section.read(section)
