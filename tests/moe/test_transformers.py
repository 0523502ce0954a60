"""Profiles of real transformers models: the same counts as the routers' own answers, the model as it was."""

import copy
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from tiny_models import FAMILIES, tiny

from forerun.moe.transformers import embeddings_of, identify, profile_model


def pieces(seed=0):
    """Ten sequences of three lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [7, 7, 3, 7, 1, 7, 7, 3, 7, 7]
    return [torch.randint(0, 128, (length,), generator=generator) for length in lengths]


def asked_one_by_one(model, layer):
    """Expert counts of each token, by running each sequence alone and asking the router's class again."""
    counts = np.zeros((128, 8))
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    kept = []
    hook = gates[layer].register_forward_hook(lambda module, inputs, output: kept.append(output[2].reshape(-1, 2)))
    for piece in pieces():
        kept.clear()
        with torch.no_grad():
            model(piece[None])
        for token, experts in zip(piece.tolist(), kept[0].tolist(), strict=True):
            counts[token, experts] += 1
    hook.remove()
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_routers(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    model.train()
    seen = []
    profile = profile_model(model, pieces(), batch=3, progress=seen.append)
    assert model.training
    assert sum(seen) == 56
    assert len(profile.paths.key) == 56
    model.eval()
    assert profile.identity == identify(model)
    assert profile.identity.layers == ((1, 2) if "Deepseek" in family else (0, 1, 2))
    for place in range(len(profile.identity.layers)):
        table = profile.table(place)
        expected = asked_one_by_one(model, place)
        # A batch of sequences is rounded otherwise than one: a near tie may fall the other way.
        assert np.abs(table.counts - expected[table.tokens]).sum() <= 2
        assert table.counts.sum() == 56 * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_model_is_refused():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match=re.escape("LlamaForCausalLM has no MoE router that forerun knows")):
        profile_model(dense, pieces())


def test_an_interrupted_profile_leaves_no_hook():
    model = tiny("Olmoe")
    with pytest.raises(IndexError):
        profile_model(model, [torch.tensor([5]), torch.tensor([4000])], batch=1)
    assert not any(module._forward_hooks for module in model.modules())


def test_embeddings_are_the_models(tmp_path):
    model = tiny("Qwen3Moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert np.array_equal(embeddings_of(str(tmp_path)), model.get_input_embeddings().weight.detach().float().numpy())
