"""Makes the environments that tests and the demo run in, each once.

    python3 tests/hosts/environments.py main sglang oldest torchrec-1.7 torchrec-1.9 vllm-0.28 sglang-0.5.18

An environment is made from complete pins without resolving anything, so that no dependency can bring a CUDA build or
another version along. Its stamp, written last, says what it was made from: a matching one is left alone, any other,
half-made ones included, is made again from nothing. Some are a folder of packages that are found before another
environment's own: another release of one framework, with everything else shared.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "StepFailed", "make"]

ROOT = Path(__file__).resolve().parents[2]

# Raise it when the steps below change in a way that environments made before lack.
RECIPE = 1

# No compiling: most modules of these environments are never imported; the others are compiled when they first are.
_PIP = ("-m", "pip", "install", "--no-deps", "--no-compile", "--no-input", "--progress-bar=off")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of the repository and the pins that it is made from."""

    name: str
    directory: str
    wheels: str
    sources: str | None = None  # pins that exist as source distributions only, built against the wheels
    hosts: str = "torch"  # what must import for the environment to count as made
    over: str | None = None  # directory of the environment whose packages these hide, set by PYTHONPATH

    def pins(self, root: Path) -> list[Path]:
        return [root / "tests" / "hosts" / name for name in (self.wheels, self.sources) if name]

    def python(self, root: Path) -> Path:
        return root / (self.over or self.directory) / "bin" / "python"

    def packages_stamp(self, root: Path) -> str:
        """What the installed packages depend on: pins, recipe, interpreter, and the place (a venv cannot be moved)."""
        return _digest(str(RECIPE), sys.version, str(root / self.directory), *(p.read_text() for p in self.pins(root)))

    def project_stamp(self, root: Path) -> str:
        """What the project's own editable install depends on: its metadata, never its code."""
        return _digest(str(RECIPE), (root / "pyproject.toml").read_text())


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("main", ".venv", "main.txt", "main-source.txt", hosts="torch, diffusers"),
        Environment("sglang", ".venv-sglang", "sglang.txt"),
        Environment("oldest", ".venv-oldest", "oldest.txt", hosts="torch, diffusers"),
        *(
            Environment(
                f"torchrec-{release}", f".venv-torchrec-{release}", f"torchrec-{release}.txt", None, "torchrec", ".venv"
            )
            for release in ("1.7", "1.9")
        ),
        Environment("deepspeed-0.19.4", ".venv-deepspeed-0.19.4", "deepspeed-0.19.4.txt", None, "torch", ".venv"),
        Environment("vllm-0.28", ".venv-vllm-0.28", "vllm-0.28.txt", None, "vllm", ".venv"),
        # Not imported: SGLang needs what `sglang_shims` adds.
        Environment("sglang-0.5.18", ".venv-sglang-0.5.18", "sglang-0.5.18.txt", None, "torch", ".venv-sglang"),
    )
}


class StepFailed(Exception):
    """A step ended with an error; its output is in the log."""


def make(environment: Environment, root: Path) -> bool:
    """Makes an environment if it is not made already; whether anything was done.

    Raises:
        StepFailed: A step ended with an error.
    """
    folder = root / environment.directory
    packages, project = folder / "forerun-packages.stamp", folder / "forerun-project.stamp"
    log = root / "build" / "environments" / f"{environment.name}.log"
    python = str(environment.python(root))
    whole = _read(packages) != environment.packages_stamp(root)
    if not whole and (environment.over or _read(project) == environment.project_stamp(root)):
        return False
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if whole:
        shutil.rmtree(folder, ignore_errors=True)
        wheels, *sources = environment.pins(root)
        if environment.over:
            command = [python, *_PIP, "--no-build-isolation", "--target", str(folder), "-r", str(wheels)]
            _step(environment, "installing", command, root, log, {"DS_BUILD_OPS": "0"})
        else:
            _step(environment, "creating", [sys.executable, "-m", "venv", str(folder)], root, log)
            _step(environment, "installing", [python, *_PIP, "-r", str(wheels)], root, log)
        for pins in sources:
            # DeepSpeed compiles its operators when they are first used, not here.
            command = [python, *_PIP, "--no-build-isolation", "-r", str(pins)]
            _step(environment, "building", command, root, log, {"DS_BUILD_OPS": "0"})
        variables = {"PYTHONPATH": str(folder)} if environment.over else {}
        _step(environment, "checking", [python, "-c", f"import {environment.hosts}"], root, log, variables)
        packages.write_text(environment.packages_stamp(root))
    if environment.over:
        return True
    _step(environment, "adding forerun", [python, *_PIP, "--no-build-isolation", "-e", "."], root, log)
    project.write_text(environment.project_stamp(root))
    return True


def _step(
    environment: Environment,
    step: str,
    command: Sequence[str],
    root: Path,
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Runs one command, its output to the log, and shows that it is under way."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=root, env={**inherited, **(variables or {})}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(process, f"{environment.name}: {step}", log, start)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        tail = "\n".join(_told(log)[-20:])
        raise StepFailed(f"{environment.name}: {step} failed (exit {process.returncode}); the end of {log}:\n{tail}")


def _watch(process: subprocess.Popen[bytes], title: str, log: Path, start: float) -> None:
    # A terminal's line is renewed every second; a CI log gets a line when a step begins, every 15 s, and at the end.
    terminal = sys.stdout.isatty()
    renewed, interval = ("\r\033[K", 1.0) if terminal else ("", 15.0)
    print(f"{title} ...", end="" if terminal else "\n", flush=True)
    while True:
        try:
            process.wait(timeout=interval)
            break
        except subprocess.TimeoutExpired:
            doing = (_told(log) or [""])[-1].strip()[:60]
            line = f"{renewed}{title} ... {time.monotonic() - start:.0f} s  {doing}"
            print(line, end="" if terminal else "\n", flush=True)
    state = "failed" if process.returncode else "done"
    print(f"{renewed}{title}: {state}, {time.monotonic() - start:.0f} s", flush=True)


def _told(log: Path) -> list[str]:
    """The log's lines, without pip's word on each index that lacks a package."""
    return [line for line in log.read_text(errors="replace").splitlines() if line and " is ignored: it is " not in line]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(stamp: Path) -> str | None:
    return stamp.read_text() if stamp.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the environments that tests and the demo run in, each once.")
    parser.add_argument("names", nargs="+", choices=sorted(ENVIRONMENTS), metavar="NAME", help=", ".join(ENVIRONMENTS))
    names = parser.parse_args(arguments).names
    # The system's python3 runs this file, whatever it is, before pip could refuse it.
    if sys.version_info < (3, 11):  # noqa: UP036
        print(f"forerun needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    for name in names:
        try:
            make(ENVIRONMENTS[name], ROOT)
        except StepFailed as error:
            print(f"{error}\n\n{_ADVICE}", file=sys.stderr)
            return 1
    return 0


_ADVICE = """The same command makes the environment again from nothing. If the check of torch failed, pip took its CUDA
build: point pip at an index of CPU builds (PIP_EXTRA_INDEX_URL) or at a folder with the wheel (PIP_FIND_LINKS)."""


if __name__ == "__main__":
    sys.exit(main())
