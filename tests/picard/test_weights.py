"""Fully fine-tuned models in their base's place for some rows; the module stays the user's."""

from __future__ import annotations

import diffusers
import pipelines as made
import pytest
import torch
from accelerate import cpu_offload
from comparison import assert_same_image, sample
from consistency_models import consistency, random_lora, tuned
from peft import LoraConfig
from test_lora import _ask
from torch import nn
from training_program import CHOICES, source

from forerun.picard.consistency import Consistency
from forerun.picard.diffusers import PicardScheduler
from forerun.picard.training import Training, train
from forerun.picard.weights import Weights


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return made.unet()


def test_every_row_is_blended_by_its_own_weight(unet):
    fine_tuned, plain = tuned(unet), _ask(unet)
    torch.manual_seed(0)
    other = made.unet()
    other.load_state_dict(fine_tuned.values)
    theirs = _ask(other)
    before = dict(unet.named_parameters())
    ours, cpu = fine_tuned.on(unet), torch.device("cpu")
    assert torch.equal(ours.answer(lambda: _ask(unet), torch.ones(3), cpu), theirs)
    rows = ours.answer(lambda: _ask(unet), torch.tensor([1.0, 0.25, 0.0]), cpu)
    assert torch.allclose(rows[0], theirs[0], atol=1e-6)
    assert torch.allclose(rows[1], 0.75 * plain[1] + 0.25 * theirs[1], atol=1e-6)
    assert torch.equal(rows[2], plain[2])
    with pytest.raises(RuntimeError, match="in the middle"), ours.replaced():
        raise RuntimeError("in the middle")
    assert all(value is before[name] for name, value in unet.named_parameters())
    assert torch.equal(_ask(unet), plain)


def test_a_users_own_lora_stays_on_both(unet):
    fine_tuned = tuned(unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    styled = _ask(unet)
    ours = fine_tuned.on(unet)
    answered = ours.answer(lambda: _ask(unet), torch.ones(3), torch.device("cpu"))
    assert torch.equal(_ask(unet), styled)
    unet.disable_adapters()
    plain = ours.answer(lambda: _ask(unet), torch.ones(3), torch.device("cpu"))
    assert not torch.allclose(answered, plain, atol=1e-3)


def test_another_models_is_refused(unet):
    values = tuned(unet).values
    name, value = next(iter(values.items()))
    for wrong, message in (
        ({**values, "nowhere.at.all": value}, "no parameter nowhere.at.all"),
        ({**values, name: value[:-1]}, f"the fine-tuned {name} is"),
    ):
        with pytest.raises(ValueError, match=message):
            Weights(wrong).on(unet)


def test_it_follows_the_model_to_another_device_and_precision(unet):
    fine_tuned = tuned(unet)
    ours = fine_tuned.on(unet)

    def answered():
        with ours.replaced():
            return dict(unet.named_parameters())

    assert all(torch.equal(value, fine_tuned.values[name]) for name, value in answered().items())
    unet.to(torch.bfloat16)
    assert {value.dtype for value in answered().values()} == {torch.bfloat16}
    unet.float()
    assert all(torch.equal(value, fine_tuned.values[name]) for name, value in answered().items())  # nothing rounded
    moved = answered()
    assert all(value is moved[name] for name, value in answered().items())  # moved once


class _Tied(nn.Module):
    """A layer under two names, and another that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.other = nn.Linear(4, 4)
        self.other.weight = self.first.weight

    def forward(self, sample):
        return self.other(self.again(self.first(sample)))


@pytest.mark.parametrize("name", ["first.weight", "again.weight", "other.weight"])
def test_a_parameter_in_several_places_is_exchanged_in_all(name):
    module = _Tied()
    own, given = module.first.weight, torch.ones(2, 4)
    expected = _Tied()
    expected.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected.first.weight.mul_(3.0)
    ours = Weights({name: own.detach() * 3.0}).on(module)
    answered = ours.answer(lambda: module(given), torch.ones(2), torch.device("cpu"))
    assert torch.equal(answered, expected(given))
    assert module.first.weight is module.other.weight is own


def test_offloading_layer_by_layer_is_refused(unet):
    fine_tuned, before = tuned(unet), _ask(unet)
    ours = fine_tuned.on(unet)
    cpu_offload(unet, torch.device("cpu"))  # as pipe.enable_sequential_cpu_offload() does it
    with pytest.raises(ValueError, match=r"is on no device between the model's calls.*enable_model_cpu_offload"):
        ours.answer(lambda: _ask(unet), torch.ones(3), torch.device("cpu"))
    assert torch.equal(_ask(unet), before)


def test_files_that_diffusers_loads(unet, tmp_path):
    pcm = consistency(unet, tuned(unet), rank=None)
    pcm.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "picard.json",
    ]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    loaded = Consistency.load(tmp_path)
    assert loaded.card == pcm.card
    for name, value in theirs.named_parameters():
        assert torch.equal(value, loaded.change.values[name])
        assert torch.equal(value, pcm.change.values[name])


def test_a_folder_with_somebodys_model_keeps_it(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lora, whole = consistency(unet, random_lora(unet, 0.1)), consistency(unet, tuned(unet), rank=None)
    for _ in range(2):  # a LoRA beside it, and again
        lora.save(tmp_path)
        with pytest.raises(FileExistsError, match=r"holds diffusion_pytorch_model.safetensors and config.json, of no"):
            whole.save(tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert Consistency.load(tmp_path).card == lora.card
    with pytest.raises(FileExistsError, match="give another folder"):
        train(source(), tmp_path, Training(**CHOICES, turns=1, full=True))


def test_a_folder_with_somebodys_lora_keeps_it(unet, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=r"holds pytorch_lora_weights.safetensors, of no"):
        consistency(unet, random_lora(unet, 0.1)).save(tmp_path)
    whole = consistency(unet, tuned(unet), rank=None)
    whole.save(tmp_path)
    assert file.read_bytes() == b"somebody's"
    assert Consistency.load(tmp_path).card == whole.card


def test_a_pcm_takes_the_place_of_another(unet, tmp_path):
    lora, whole = consistency(unet, random_lora(unet, 0.1)), consistency(unet, tuned(unet), rank=None)
    for pcm in (lora, lora, whole, whole, lora):
        pcm.save(tmp_path)
        assert Consistency.load(tmp_path).card == pcm.card
        assert {path.name for path in tmp_path.iterdir()} == {"picard.json", *pcm.card.files}


@pytest.mark.parametrize(("switch", "ages"), [("hard", 1), ("linear", 3)])
def test_on_a_pipeline(switch, ages):
    pipe, arguments = made.stable_diffusion()
    sequential = sample(pipe, arguments)
    pcm = consistency(pipe.unet, tuned(pipe.unet, 0.05), ages=ages, rank=None)
    for options in ({}, {"max_points_per_call": 3}):
        pipe.scheduler = PicardScheduler.from_pipe(
            pipe, pcm=pcm, switch=switch, tolerance=0, check_cost=False, **options
        )
        assert_same_image(sample(pipe, arguments), sequential)
        assert 1 <= pipe.scheduler.report.guided_rounds <= ages  # one that makes no samples is given up
        pipe.scheduler = pipe.scheduler.detach()
    assert torch.equal(sample(pipe, arguments), sequential)
