"""Requests follow the plan that the first rank says is followed, in another process than the one that routes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tables import random_profile

from forerun.moe.planning import make_plan
from forerun.moe.requests import Arrivals
from forerun.moe.sglang_requests import Followed, Routes

PLAN, OTHER = (make_plan(random_profile(seed=seed)[0], 4, effort=1) for seed in (0, 1))
REQUESTS = [[token] * 100 for token in range(40)]
VARIABLE = "FORERUN_SGLANG_FOLLOWED"
TELL = """
import sys
from pathlib import Path
from forerun.moe.plan import Plan
from forerun.moe.sglang_requests import Followed
Followed().tell(Plan.load(Path(sys.argv[1])) if len(sys.argv) > 1 else None)
"""


@pytest.fixture
def routes(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    PLAN.save(tmp_path / "plan.safetensors")
    yield Routes(tmp_path / "plan.safetensors", PLAN, Followed())
    Path(os.environ[VARIABLE]).unlink(missing_ok=True)
    monkeypatch.delenv(VARIABLE)


def by(plan):
    arrivals = Arrivals(plan)
    return [arrivals.rank(request) for request in REQUESTS]


def sent(routes):
    return [routes.rank(str(at), request) for at, request in enumerate(REQUESTS)]


def test_until_there_is_word_the_first_plan_is_followed(routes):
    assert sent(routes) == by(PLAN)


def test_word_of_another_process_is_heeded(routes, tmp_path):
    def tell(*path):
        subprocess.run([sys.executable, "-c", TELL, *path], check=True, timeout=120)

    tell()
    assert sent(routes) == [None] * len(REQUESTS)
    OTHER.save(tmp_path / "plan.safetensors")
    tell(tmp_path / "plan.safetensors")
    assert sent(routes) == by(OTHER) != by(PLAN)


def test_a_plan_that_is_not_there_to_be_read_balances_nothing(routes, tmp_path, caplog):
    Followed().tell(OTHER)  # the file still has the first one
    assert sent(routes) == [None] * len(REQUESTS)
    (tmp_path / "plan.safetensors").write_bytes(b"no plan")
    Followed().tell(None)
    assert routes.rank("name", [1]) is None
    Followed().tell(OTHER)
    assert routes.rank("name", [1]) is None
    assert "requests go to ranks as SGLang balances them" in caplog.text
    Followed().tell(PLAN)
    assert sent(routes) == by(PLAN)


def test_requests_that_wait_are_evened_out_once_others_are_answered(routes):
    for at in range(5):  # not as many on each rank
        routes.rank(f"alone {at}", [1] * 4, waiting=())
    together = [f"together {at}" for at in range(8)]
    found = [routes.rank(name, [1] * 4, waiting=together) for name in together]
    assert sorted(found) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_file_is_gone_with_the_process_that_made_it(routes, caplog):
    code = f"import os; from forerun.moe.sglang_requests import Followed; Followed(); print(os.environ['{VARIABLE}'])"
    without = {name: value for name, value in os.environ.items() if name != VARIABLE}
    told = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=without, capture_output=True)
    assert not Path(told.stdout.decode().split()[-1]).exists()
    Path(os.environ[VARIABLE]).unlink()
    Followed().tell(None)  # a rank that outlives it goes on
    assert "requests go to the ranks that they went to before" in caplog.text
    assert sent(routes) == by(PLAN)
    assert not Path(os.environ[VARIABLE]).exists()
