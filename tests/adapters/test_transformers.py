"""What `forerun_adapters.transformers` stands on: every family's routers, as they are in the installed release."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

sys.path.append(str(Path(__file__).parents[1] / "moe"))

from tiny_models import FAMILIES, tiny

from forerun_adapters import transformers as host


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_found_and_tell_what_the_experts_are_given(family):
    model = tiny(family)
    found = host.routers(model)
    assert [router.layer for router in found] == ([1, 2] if "Deepseek" in family else [0, 1, 2])
    assert {(router.experts, router.top_k) for router in found} == {(8, 2)}
    given = []
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1])) for module in experts]
    with torch.no_grad(), host.watched(found) as chosen:
        model(torch.arange(10).view(2, 5))
    for hook in hooks:
        hook.remove()
    assert sorted(chosen) == [router.layer for router in found]
    for (_, seen), passed in zip(sorted(chosen.items()), given, strict=True):
        assert seen.shape == (10, 2)
        assert torch.equal(seen, passed.reshape(10, 2))
    assert all(not router.module._forward_hooks for router in found)


def test_a_router_that_returns_something_else_is_an_error():
    model = tiny("Olmoe")
    found = host.routers(model)
    found[1].module.forward = lambda hidden: hidden
    message = r"gate returns Tensor; expected \(logits, weights, indices\)"
    with pytest.raises(TypeError, match=message), host.watched(found):
        model(torch.arange(5)[None])
    assert all(not router.module._forward_hooks for router in found)


def test_the_missing_library_is_named(monkeypatch):
    from importlib import metadata

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'forerun\[deepspeed\]'"):
        importlib.reload(host)
