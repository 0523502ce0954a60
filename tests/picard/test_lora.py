"""LoRAs weighted by row, against peft's own; they leave the module and the user's adapters as they were."""

from __future__ import annotations

import pipelines as made
import pytest
import torch
from consistency_models import as_found, random_lora
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from forerun.picard.lora import Lora


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return made.unet()


def _ask(unet, rows=3):
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.arange(rows) * 10, text).sample


def _add_peft(unet, lora, name, scale=1.0):
    rank = next(iter(lora.layers.values()))[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=list(lora.layers))
    inject_adapter_in_model(config, unet, name)
    weights = {f"{layer}.lora_A.weight": down for layer, (down, _) in lora.layers.items()}
    weights |= {f"{layer}.lora_B.weight": up for layer, (_, up) in lora.layers.items()}
    set_peft_model_state_dict(unet, weights, name)


def test_every_row_has_its_own_scale_as_peft_would_give_it(unet):
    lora, weights = random_lora(unet, 0.5), torch.tensor([1.0, 0.25, 0.0])
    plain = _ask(unet)
    ours = lora.on(unet)
    with ours.weighted(weights):
        rows = _ask(unet)
    assert torch.equal(_ask(unet), plain)
    for row, weight in enumerate(weights.tolist()):
        torch.manual_seed(0)
        theirs = made.unet()
        _add_peft(theirs, lora, "reference", weight)
        assert torch.allclose(rows[row], _ask(theirs)[row], atol=1e-5)
    assert not torch.allclose(rows[0], plain[0], atol=1e-3)
    assert torch.equal(rows[2], plain[2])


def test_a_users_own_lora_stays_as_it_is(unet):
    users = {name: pair for name, pair in random_lora(unet, 0.5, seed=7).layers.items() if "to_" in name}
    _add_peft(unet, Lora(users, 1.0), "style")
    styled, names, before = _ask(unet), [name for name, _ in unet.named_parameters()], as_found(unet)
    active = [module.active_adapters for module in unet.modules() if hasattr(module, "active_adapters")]
    base_names = {name.replace(".base_layer", "") for name, _ in unet.named_modules()}
    lora = random_lora(made.unet(), 0.5)
    assert set(lora.layers) <= base_names
    ours = lora.on(unet)
    with pytest.raises(RuntimeError, match="in the middle"), ours.weighted(torch.ones(3)):
        assert not torch.allclose(_ask(unet), styled, atol=1e-3)
        raise RuntimeError("in the middle")
    assert torch.equal(_ask(unet), styled)
    assert [name for name, _ in unet.named_parameters()] == names
    assert [module.active_adapters for module in unet.modules() if hasattr(module, "active_adapters")] == active
    assert as_found(unet) == before


def test_another_models_lora_is_refused(unet):
    lora = random_lora(unet, 0.5)
    name, (down, up) = next(iter(lora.layers.items()))
    for layers, message in (
        ({**lora.layers, "nowhere.at.all": (down, up)}, "no layer nowhere.at.all"),
        ({**lora.layers, name: (down, up[:-1])}, f"the LoRA's change of {name} is"),
        ({**lora.layers, "conv_norm_out": (down, up)}, "conv_norm_out, a GroupNorm"),
    ):
        with pytest.raises(ValueError, match=message):
            Lora(layers, 1.0).on(unet)


def test_half_precision_rows():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    ours = random_lora(layer, 1.0).on(layer)
    with ours.weighted(torch.tensor([1.0, 0.0])):
        assert layer(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


class _Shared(nn.Module):
    """A layer that answers once for all rows of a call, as one for a single timestep does."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.last = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.last(sample + self.time(timestep.reshape(1, 1)))


def test_a_layer_that_answers_for_several_rows_is_named():
    module = _Shared()
    before = as_found(module)
    for weights in (torch.ones(3), torch.tensor([1.0, 0.0, 0.5])):
        with pytest.raises(ValueError, match=r"time, which the LoRA changes, was given 1 rows in a call of 3.*--full"):
            random_lora(module, 0.5).on(module).answer(
                lambda: module(torch.ones(3, 4), torch.ones(1)), weights, torch.device("cpu")
            )
        assert as_found(module) == before


def test_a_grouped_convolution_is_refused():
    layer = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    weights = {"0": (torch.ones(1, 2, 1), torch.ones(4, 1, 1))}
    with pytest.raises(ValueError, match="0, a Conv1d: only linear layers, and convolutions of one group"):
        Lora(weights, 1.0).on(layer)


def test_a_layer_under_two_names():
    module = nn.ModuleDict({"first": nn.Linear(4, 4)})
    module["second"] = module["first"]
    change = (torch.ones(1, 4), torch.ones(4, 1))
    ours = Lora({"second": change}, 1.0).on(module)
    with ours.weighted(torch.ones(2)):
        changed = module["first"](torch.ones(2, 4))
    assert torch.allclose(changed, module["second"](torch.ones(2, 4)) + 4)


def test_what_was_moved_to_half_precision_comes_back_whole():
    layer = nn.Sequential(nn.Linear(8, 8))
    ours, given = random_lora(layer, 1.0).on(layer), torch.ones(2, 8)

    def change():
        return ours.answer(lambda: layer(given), torch.ones(2), torch.device("cpu")) - layer(given)

    before = change()
    layer.to(torch.bfloat16)
    given = given.to(torch.bfloat16)
    change()
    layer.float()
    given = given.float()
    assert torch.allclose(change(), before, atol=1e-6)


def test_no_copy_to_the_device_waits():
    """Each that does would be a host sync; a sweep has one."""
    copies = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                copies.append(kwargs.get("non_blocking", False))
            return function(*args, **(kwargs or {}))

    layer = nn.Sequential(nn.Linear(8, 8, device="meta"))
    ours = random_lora(nn.Sequential(nn.Linear(8, 8)), 1.0).on(layer)
    for expected in ([True, True, False, False], [True, True]):  # what is moved once, the first time
        copies.clear()
        with Watching(), ours.weighted(torch.tensor([1.0, 0.0]), torch.device("meta")):
            assert sorted(copies, reverse=True) == expected
