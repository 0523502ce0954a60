"""LoRAs weighted by row, against peft's own; they leave the module and the user's adapters as they were."""

from __future__ import annotations

import pipelines as made
import pytest
import torch
from consistency_models import random_lora
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

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
    ours.remove()
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
    styled, names = _ask(unet), [name for name, _ in unet.named_parameters()]
    active = [module.active_adapters for module in unet.modules() if hasattr(module, "active_adapters")]
    base_names = {name.replace(".base_layer", "") for name, _ in unet.named_modules()}
    lora = random_lora(made.unet(), 0.5)
    assert set(lora.layers) <= base_names
    ours = lora.on(unet)
    with pytest.raises(RuntimeError, match="in the middle"), ours.weighted(torch.ones(3)):
        assert not torch.allclose(_ask(unet), styled, atol=1e-3)
        raise RuntimeError("in the middle")
    assert torch.equal(_ask(unet), styled)
    ours.remove()
    assert torch.equal(_ask(unet), styled)
    assert [name for name, _ in unet.named_parameters()] == names
    assert [module.active_adapters for module in unet.modules() if hasattr(module, "active_adapters")] == active
    assert not any(layer._forward_hooks for layer in unet.modules())


def test_another_models_lora_is_refused_and_nothing_is_hooked(unet):
    lora = random_lora(unet, 0.5)
    name, (down, up) = next(iter(lora.layers.items()))
    for layers, message in (
        ({**lora.layers, "nowhere.at.all": (down, up)}, "no layer nowhere.at.all"),
        ({**lora.layers, name: (down, up[:-1])}, f"the LoRA's change of {name} is"),
        ({**lora.layers, "conv_norm_out": (down, up)}, "conv_norm_out, a GroupNorm"),
    ):
        with pytest.raises(ValueError, match=message):
            Lora(layers, 1.0).on(unet)
        assert not any(layer._forward_hooks for layer in unet.modules())


def test_half_precision_rows():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    ours = random_lora(layer, 1.0).on(layer)
    with ours.weighted(torch.tensor([1.0, 0.0])):
        assert layer(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
