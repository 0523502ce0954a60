"""Which frameworks are installed, what forerun can do for each, and what would have to be installed.

Reads the metadata of installed distributions only: no framework is imported, no device is asked. Where FORERUN_SGLANG
is set, it and the files that it names are read too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rich.markup import escape
from rich.table import Table

import forerun
from forerun_adapters._require import HOSTS, Host
from forerun_adapters.sglang_plugin import VARIABLE, read

__all__ = ["DROP_INS", "Asked", "Checkup", "DropIn", "HostCheck", "examine"]


@dataclass(frozen=True)
class DropIn:
    """What a user imports, and where this release's tests and measurements have run it."""

    path: str
    host: str
    needs: tuple[str, ...]  # distributions beside the host's own
    cpu: bool  # run on a CPU
    gpu: bool  # run on a GPU

    @property
    def ran_on(self) -> str:
        return f"{'run' if self.cpu else 'not run'} on CPU, {'run' if self.gpu else 'not run'} on GPU"


# `cpu` and `gpu` are held to the committed tests and results by tests/house/test_doctor.py.
DROP_INS = (
    DropIn("forerun.picard.diffusers.PicardScheduler", "diffusers", needs=("torch",), cpu=True, gpu=False),
    DropIn("forerun.dlrm.torchrec.DLRMPlanner", "torchrec", needs=("torch", "numpy", "scipy"), cpu=True, gpu=False),
    DropIn(
        "forerun.runahead.vllm.RunaheadConnector",
        "vllm",
        needs=("torch", "numpy", "scipy", "aiohttp", "cryptography", "prometheus-client"),  # `forerun runahead serve`'s
        cpu=True,
        gpu=False,
    ),
    DropIn(
        "forerun.moe.deepspeed.speculate",
        "deepspeed",
        needs=("torch", "numpy", "safetensors", "transformers"),
        cpu=True,
        gpu=False,
    ),
    DropIn("forerun.moe.sglang", "sglang", needs=("torch", "numpy", "safetensors"), cpu=True, gpu=False),
    DropIn("forerun.runahead.sglang", "sglang", needs=("torch", "numpy", "scipy"), cpu=True, gpu=False),
)


@dataclass(frozen=True)
class HostCheck:
    """What was found of one framework."""

    host: str
    distribution: str | None  # None if it is not installed
    version: str | None
    supported: str  # the range
    ok: bool  # False if it is installed in a release outside of the range
    drop_ins: tuple[DropIn, ...]  # what this release has for it
    usable: tuple[str, ...]  # paths of those that can be imported now
    remedy: str | None  # what makes the rest usable; None where there is nothing to gain


@dataclass(frozen=True)
class Asked:
    """What FORERUN_SGLANG asks of an SGLang server that is started from here."""

    sections: tuple[str, ...]
    files: tuple[str, ...]  # what is in each file that they name
    trouble: str | None  # what cannot be read, so that no server starts

    def __str__(self) -> str:
        if self.trouble is not None:
            return f"{VARIABLE} cannot be met, no SGLang server starts with it: {self.trouble}"
        told = f"{VARIABLE} asks SGLang's servers for {' and '.join(self.sections) or 'nothing'}"
        return "; ".join((told, *self.files))


@dataclass(frozen=True)
class Checkup:
    """The whole of `forerun doctor`."""

    forerun: str
    python: str
    hosts: tuple[HostCheck, ...]
    asked: Asked | None = None  # None: the variable is not set

    @property
    def healthy(self) -> bool:
        """Whether every framework that is installed is of a supported release, and what is asked for can be read."""
        return all(host.ok for host in self.hosts) and (self.asked is None or self.asked.trouble is None)

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "healthy": self.healthy}, indent=2)

    def as_table(self) -> Table:
        asked = str(self.asked or f"{VARIABLE} is not set: SGLang's servers are stock")
        table = Table(title=f"forerun {self.forerun}", caption=escape(asked), caption_justify="left")
        for heading in ("framework", "installed", "supported", "drop-ins", "what to do"):
            table.add_column(heading, overflow="fold")  # a command that is cut off helps nobody
        for host in self.hosts:
            installed = f"{host.distribution} {host.version}" if host.distribution else "no"
            drop_ins = [
                f"{drop_in.path} ({'usable' if drop_in.path in host.usable else 'not usable'}; {drop_in.ran_on})"
                for drop_in in host.drop_ins
            ]
            table.add_row(
                host.host,
                installed if host.ok else f"[red]{installed}: not supported[/red]",
                host.supported,
                "\n".join(drop_ins),
                # Brackets in a remedy are pip's, not rich's.
                (host.remedy or "").replace("[", r"\["),
            )
        return table


def examine() -> Checkup:
    """Looks at this Python's installed distributions, and at what is asked of SGLang."""
    hosts = tuple(_examine(name, host) for name, host in HOSTS.items())
    return Checkup(forerun.__version__, platform.python_version(), hosts, _asked(os.environ.get(VARIABLE, "").strip()))


def _examine(name: str, host: Host) -> HostCheck:
    found = host.installed()
    ok = found is None or host.supports(found[1])
    drop_ins = tuple(drop_in for drop_in in DROP_INS if drop_in.host == name)
    usable = tuple(
        drop_in.path for drop_in in drop_ins if found is not None and ok and all(map(_installed, drop_in.needs))
    )
    return HostCheck(
        host=name,
        distribution=found[0] if found else None,
        version=str(found[1]) if found else None,
        supported=str(host.supported),
        ok=ok,
        drop_ins=drop_ins,
        usable=usable,
        remedy=host.remedy if not ok or len(usable) < len(drop_ins) else None,
    )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _asked(given: str) -> Asked | None:
    if not given:
        return None
    try:
        sections = read(given)
        return Asked(tuple(sections), tuple(told for section in sections.items() for told in _files(*section)), None)
    except (ImportError, OSError, TypeError, ValueError) as error:
        return Asked((), (), str(error))


def _files(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    """Reads the file that a section names, if any, as the drop-in will."""
    if name == "speculative_moe":
        from forerun.moe.plan import Plan
        from forerun.moe.sglang_config import Section

        path = Section.read(section).plan
        if path is not None:
            plan = Plan.load(path)
            yield f"{path} is a plan of {plan.identity} on {plan.ranks} ranks"
    elif "table" in section:
        from forerun.runahead.table import Table as Splits

        yield f"{section['table']} is a table of {Splits.load(section['table']).engines} ranks"
