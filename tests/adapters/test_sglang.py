"""Hooks on SGLang: put, applied, checked, on the real registry."""

import os
from importlib import metadata

import pytest

pytest.importorskip("sglang")

from sglang.srt.plugins import hook_registry

from forerun_adapters import sglang as host
from forerun_adapters._require import HOSTS

TARGET = "sglang.srt.plugins.hook_registry._format_source"
CLASS = "sglang.srt.plugins.hook_registry.HookSource"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """SGLang's registry, and what the tests hook, as they are."""
    registry = hook_registry.HookRegistry
    monkeypatch.setattr(registry, "_hooks", type(registry._hooks)(list))
    monkeypatch.setattr(registry, "_patched", set())
    monkeypatch.setattr(hook_registry, "_format_source", hook_registry._format_source)
    stock = registry.__dict__["apply_hooks"]
    yield registry
    registry.apply_hooks = stock


def shouted(original, source):
    return original(source).upper()


def test_this_is_the_release_that_was_asked_for():
    asked = os.environ.get("FORERUN_SGLANG_RELEASE", "0.5.23")  # `make test-sglang` sets it
    assert metadata.version("sglang") == asked


def test_a_hook_is_applied_and_checked(registry):
    hook = host.Hook(TARGET, shouted)
    host.put([hook])
    assert host.missing([hook]) == [TARGET]
    registry.apply_hooks()
    assert host.missing([hook]) == []
    assert hook_registry._format_source(None) == "UNKNOWN"


def test_the_check_is_made_once(registry):
    stock = registry.__dict__["apply_hooks"]
    host.put([host.Hook(TARGET, shouted)])
    registry.apply_hooks()
    assert registry.__dict__["apply_hooks"] is stock


@pytest.mark.parametrize("target", ["sglang.srt.no_such_module.function", "sglang.srt.plugins.load_no_plugins"])
def test_a_target_that_this_release_lacks_is_named(target, registry):
    with pytest.raises(ValueError, match=target) as refused:
        host.put([host.Hook(TARGET, shouted), host.Hook(target, shouted)])
    assert str(host.RELEASE) in str(refused.value)
    assert str(HOSTS["sglang"].supported) in str(refused.value)
    assert not registry._hooks  # none, not a part


def test_a_hook_that_sglang_does_not_apply_ends_start_up(registry):
    host.put([host.Hook(CLASS, shouted)])  # only a replacement can stand in for a class: SGLang logs it and goes on
    with pytest.raises(SystemExit, match=rf"forerun: no hook on {CLASS} in sglang {host.RELEASE}"):
        registry.apply_hooks()
