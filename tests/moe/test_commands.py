"""`forerun moe profile | plan | show`, from text files to a picture."""

import dataclasses
import io
import json

import pytest
from rich.console import Console
from tables import random_profile
from typer.testing import CliRunner

from forerun import cli
from forerun.moe.plan import Plan
from forerun.moe.profile import Profile
from forerun.moe.report import as_table


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, ["moe", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny OLMoE and a tokenizer of single characters, in a folder named toy."""
    pytest.importorskip("transformers", minversion="5")
    from tiny_models import tiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "toy"
    tiny("Olmoe").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({chr(at): at for at in range(128)}, unk_token="\x00"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="\x00").save_pretrained(folder)
    return folder


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.safetensors"
    random_profile(tokens=1500)[0].save(path)
    return path


def shown(table):
    """As on a wide terminal."""
    screen = io.StringIO()
    Console(file=screen, width=400).print(table)
    return screen.getvalue()


def assert_one_line_error(result, *told):
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    for text in told:
        assert text in result.stderr


def test_from_texts_to_a_picture(run, model, tmp_path):
    for name, text in (("one.txt", "the quick brown fox " * 20), ("two.txt", "jumps over " * 30)):
        (tmp_path / name).write_text(text)
    texts = (tmp_path / "one.txt", tmp_path / "two.txt")
    out, plan, picture = (tmp_path / name for name in ("p.safetensors", "plan.safetensors", "plan.png"))
    done = run("profile", *texts, "--model", model, "--out", out, "--length", 64)
    assert done.exit_code == 0, done.output
    assert "'toy' (3 MoE layers, top 2 of 8 experts): 730 tokens" in done.stdout
    assert Profile.load(out).table(0).counts.sum() == 730 * 2
    done = run("plan", out, "--ranks", 4, "--model", model, "--out", plan)
    assert done.exit_code == 0, done.output
    assert len(Plan.load(plan).tokens) == 128
    done = run("show", plan, "--picture", picture)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(run("show", plan, "--json").stdout)
    assert (told["ranks"], len(told["layers"]), told["identity"]["model"]) == (4, 3, "toy")
    assert told["layers"][0]["local"] > 0.25


def test_a_placement_for_sglangs_own_option(run, profile, tmp_path):
    plan, placement = tmp_path / "plan.safetensors", tmp_path / "placement.json"
    assert run("plan", profile, "--ranks", 4, "--out", plan, "--effort", 1).exit_code == 0
    assert run("show", plan, "--sglang", placement).exit_code == 0
    (rows,) = json.loads(placement.read_text()).values()
    made = Plan.load(plan)
    layers, each = made.identity.layers, made.identity.experts // 4
    assert len(rows) == max(layers) + 1
    for number, row in enumerate(rows):
        assert sorted(row) == list(range(made.identity.experts))
        if number in layers:
            assert [made.rank[layers.index(number), expert] for expert in row] == [0] * each + [1] * each + [
                2
            ] * each + [3] * each
        else:
            assert row == sorted(row)


def test_bytes_are_of_rows_there_and_back(run, profile, tmp_path):
    plan = tmp_path / "plan.safetensors"
    assert run("plan", profile, "--ranks", 4, "--out", plan, "--effort", 1).exit_code == 0
    bare = json.loads(run("show", plan, "--json").stdout)["layers"]
    told = json.loads(run("show", plan, "--json", "--row-bytes", 4096 * 2).stdout)["layers"]
    for layer, before in zip(told, bare, strict=True):
        assert layer.pop("bytes") == pytest.approx(2 * before["sent"] * 8192)
        assert layer.pop("contiguous_bytes") == pytest.approx(2 * before["contiguous_sent"] * 8192)
        assert layer == before
    made = Plan.load(plan)
    assert "bytes" not in shown(as_table(made))
    ours, stock = (2 * rows * 8192 for rows in (made.layers[0].sent, made.layers[0].contiguous_sent))
    assert 0 < ours < stock
    assert f"{ours:,.0f} ({stock:,.0f})" in shown(as_table(made, 8192))
    unknown = [dataclasses.replace(report, sent=None, contiguous_sent=None) for report in made.layers]
    assert shown(as_table(dataclasses.replace(made, layers=tuple(unknown)), 8192)).count("- (-)") == 2 * len(unknown)
    assert run("show", plan, "--row-bytes", 8192).exit_code == 0
    for arguments in ((), ("--json",)):
        assert_one_line_error(run("show", plan, "--row-bytes", 0, *arguments), "row_bytes is 0; expected the bytes of")


def test_profiles_are_merged_and_hosts_heard(run, profile, tmp_path):
    other = tmp_path / "other.safetensors"
    random_profile(tokens=700, seed=3)[0].save(other)
    plan = tmp_path / "plan"
    arguments = ("--ranks", 4, "--hosts", 2, "--near", 0.8, "--effort", 3, "--out", plan)
    assert run("plan", profile, other, *arguments).exit_code == 0
    assert all(report.saved > report.local for report in Plan.load(plan).layers)


def test_some_tokens_only(run, model, tmp_path):
    (tmp_path / "text").write_text("words and more words " * 100)
    out = tmp_path / "p"
    assert (
        run("profile", tmp_path / "text", "--model", model, "--out", out, "--length", 50, "--tokens", 120).exit_code
        == 0
    )
    assert Profile.load(out).table(0).counts.sum() == 150 * 2


def test_limits_that_cannot_be_kept_are_told(run, profile, tmp_path):
    result = run("plan", profile, "--ranks", 8, "--experts", 1.0, "--out", tmp_path / "plan")
    assert result.exit_code == 0
    assert "no placement was found within the limits" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("plan", "none", "--ranks", "2"), ["none: No such file"]),
        (("plan", "{profile}", "--ranks", "3"), ["8 experts do not divide by 3 ranks"]),
        (("plan", "{profile}", "--ranks", "4", "--near", "2"), ["near is 2"]),
        (("plan", "{text}", "--ranks", "2"), ["is not a profile written by forerun"]),
        (("show", "{profile}"), ["is a profile; expected a plan"]),
        (("show", "{text}"), ["is not a plan written by forerun"]),
        (("profile", "none", "--model", "x"), ["none: No such file"]),
        (("profile", "{text}", "--model", "{folder}"), ["forerun moe profile:"]),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, profile, tmp_path, arguments, told):
    pytest.importorskip("transformers", minversion="5")
    (tmp_path / "text").write_text("no profile")
    places = {"profile": profile, "text": tmp_path / "text", "folder": tmp_path}
    result = run(*(argument.format(**places) for argument in arguments), "--out", tmp_path / "out")
    if arguments[0] == "show":
        result = run(*(argument.format(**places) for argument in arguments))
    assert_one_line_error(result, *told)
    assert not (tmp_path / "out").exists()


def test_a_text_without_tokens_is_refused(run, model, tmp_path):
    (tmp_path / "text").write_text("")
    result = run("profile", tmp_path / "text", "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "forerun moe profile: the texts have no token: nothing was counted"
    assert not (tmp_path / "out").exists()
