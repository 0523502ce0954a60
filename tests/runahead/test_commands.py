"""`forerun runahead plan` and `serve`: what they say, and their errors."""

from __future__ import annotations

import json
import socket

import pytest
from typer.testing import CliRunner

from forerun import cli
from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.table import make_table

LLAMA = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(
        cli.app, ["runahead", "plan", *map(str, arguments)], env={"COLUMNS": "200"}
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "dtype": "float16"}))
    return path


@pytest.fixture
def table(tmp_path):
    chain = Chain(Cost(1e-3, 1e-4, 0, 3e-9), Link(2e9, 1e-4), 12, 8192)
    path = tmp_path / "table.json"
    make_table(chain, [1024, 4096], 2, model="tiny", hardware="1 core", block=16).save(path)
    return path


def test_a_config_is_planned(run, config):
    result = run("--tokens", 16384, "--engines", 3, "--config", config, "--tflops", 150, "--gbytes", 300)
    assert result.exit_code == 0, result.output
    assert "16384 tokens over 3 engines: first token after" in result.stdout
    assert "MB sent" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.strip().startswith(("1 ▒", "2 ", "3 "))]) >= 3


def test_a_table_is_planned(run, table):
    result = run("--tokens", 2000, "--table", table)
    assert result.exit_code == 0, result.output
    assert "over 2 engines" in result.stdout
    assert run("--tokens", 2000, "--table", table, "--engines", 1).stdout.count("on one engine") == 1


def test_what_gains_nothing_says_so(run, config):
    result = run("--tokens", 100, "--config", config, "--tflops", 150, "--gbytes", 0.01)
    assert result.exit_code == 0, result.output
    assert "a chain would gain nothing" in result.stdout


def test_a_picture_is_drawn(run, config, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "chain.png"
    result = run("--tokens", 4096, "--config", config, "--tflops", 150, "--picture", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        ("{}", ["--tflops", 1], "num_attention_heads"),
        ("[]", ["--tflops", 1], "no JSON object"),
        ("not json", ["--tflops", 1], "Expecting value"),
        (json.dumps({**LLAMA, "dtype": "int3"}), ["--tflops", 1], "int3"),
        (json.dumps(LLAMA), [], "--tflops"),
        (json.dumps(LLAMA), ["--tflops", 0], "flops is 0"),
        (json.dumps(LLAMA), ["--tflops", 1, "--gbytes", 0], "bandwidth is 0"),
        (json.dumps(LLAMA), ["--tflops", 1, "--engines", 0], "engines is 0"),
        (json.dumps(LLAMA), ["--tflops", 1, "--block", -1], "block is -1"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, content, arguments, told):
    path = tmp_path / "config.json"
    path.write_text(content)
    result = run("--tokens", 100, "--config", path, *arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr


def test_one_source_of_costs_is_wanted(run, table, config, tmp_path):
    assert "--table, or --config" in run("--tokens", 100).stderr
    assert "--table, or --config" in run("--tokens", 100, "--table", table, "--config", config).stderr
    assert "none.json" in run("--tokens", 100, "--table", tmp_path / "none.json").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "0"], "--engines is 0; expected 1 or more, or 0 with --join"),
        (["--join", "10.0.0.2:8000"], "expected URL=HOST:PORT"),
        (["--join", "http://10.0.0.2:8000=10.0.0.2"], "expected host:port"),
        (["--engines", "0", "--join", "http://a:1=a:2", "--dtype", "auto"], "are for engines started here"),
        (["--engines", "100000"], "cores for 100000 engines of 1: take fewer engines"),
        (["--kv-transfer-config", "{}"], "--kv-transfer-config is set for each engine"),
        (["--cores", "0|0"], "one is named twice"),
        (["--refined", "table.json"], "--refined keeps a refined --table"),
    ],
)
def test_serve_says_what_is_wrong(arguments, message, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    result = CliRunner().invoke(cli.app, ["runahead", "serve", "some/model", "--port", "0", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_serve_takes_no_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli.app, ["runahead", "serve", "some/model", "--port", port])
    assert result.exit_code == 1
    assert f"127.0.0.1:{port}: Address already in use" in result.stderr


def test_serve_takes_no_table_of_another_model(table):
    result = CliRunner().invoke(cli.app, ["runahead", "serve", "some/model", "--port", "0", "--table", str(table)])
    assert result.exit_code == 1
    assert "expected some/model: make one by `forerun runahead tune`" in result.stderr


def test_serve_says_so_when_engines_that_were_joined_do_not_answer():
    join = ["--engines", "0", "--join", "http://127.0.0.1:9=127.0.0.1:9", "--start-timeout", "1"]
    result = CliRunner().invoke(cli.app, ["runahead", "serve", "some/model", "--port", "0", *join])
    assert result.exit_code == 1
    assert "no engine answers at http://127.0.0.1:9 after 1 s" in result.stderr


def test_serve_wants_the_model_before_vllms_options():
    result = CliRunner().invoke(cli.app, ["runahead", "serve", "--engines", "2", "--dtype", "float32", "some/model"])
    assert result.exit_code == 1
    assert "the model comes before --dtype" in result.stderr


def test_serve_says_so_when_the_model_is_not_there(tmp_path):
    result = CliRunner().invoke(cli.app, ["runahead", "serve", f"{tmp_path}/none"])
    assert result.exit_code == 1
    assert f"there is no folder {tmp_path}/none" in result.stderr
