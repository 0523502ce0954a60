"""Tiny real diffusers pipelines around a UNet, with random weights, made on the spot.

A builder returns the pipeline and what to call it with. `dit_pipelines.py` has those around a transformer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's schedule

Made = tuple[Any, dict[str, Any]]


def tokenizer(length: int = 16) -> Any:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def text_encoder(kind: type[Any] = transformers.CLIPTextModel, length: int = 16) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=32,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    return kind(config).eval()


def vae(**config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    ).eval()


def unet(**config: Any) -> Any:
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **config}).eval()


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(
        **{**LATENT, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config}
    )


def brief(kind: type[Any], **config: Any) -> Any:
    """A short noise schedule, after which pixels of a random model mostly stay within [0, 1], where pipelines clamp."""
    return kind(**{"num_train_timesteps": 100, "clip_sample": False, **config})


def _latent_parts(**parts: Any) -> dict[str, Any]:
    seeded()
    made = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": unet(), "scheduler": ddim()}
    return {**made, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **parts}


def stable_diffusion() -> Made:
    pipe = diffusers.StableDiffusionPipeline(**_latent_parts())
    return pipe, {"prompt": ["a cat", "dog"], "guidance_scale": 7.5}


def image_to_image() -> Made:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**_latent_parts())
    return pipe, {"prompt": "a cat", "image": torch.rand(1, 3, 16, 16), "strength": 0.6, "num_inference_steps": 16}


def inpaint(channels: int = 9) -> Made:
    pipe = diffusers.StableDiffusionInpaintPipeline(**_latent_parts(unet=unet(in_channels=channels)))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1
    return pipe, {"prompt": "a cat", "image": torch.rand(1, 3, 16, 16), "mask_image": mask, "height": 16, "width": 16}


def instruct_pix2pix() -> Made:
    parts = _latent_parts(
        unet=unet(in_channels=8), scheduler=diffusers.EulerAncestralDiscreteScheduler(**LATENT, steps_offset=1)
    )
    return diffusers.StableDiffusionInstructPix2PixPipeline(**parts), {
        "prompt": "a cat",
        "image": torch.rand(1, 3, 16, 16),
    }


def controlnet(nets: int = 1) -> Made:
    parts = _latent_parts()
    made = []
    for _ in range(nets):
        net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)).eval()
        for parameter in net.parameters():
            if not parameter.any():  # its output convolutions begin at zero, and the test would see nothing of it
                nn.init.normal_(parameter, std=0.3)
        made.append(net)
    pipe = diffusers.StableDiffusionControlNetPipeline(controlnet=made[0] if nets == 1 else made, **parts)
    image = torch.rand(2, 3, 32, 32)  # the conditioning is halved as often as this embedding has steps
    return pipe, {
        "prompt": ["a cat", "dog"],
        "image": image if nets == 1 else [image] * nets,
        "height": 32,
        "width": 32,
    }


def stable_diffusion_xl() -> Made:
    seeded()
    net = unet(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(**LATENT, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return pipe, {"prompt": ["a cat", "dog"], "height": 16, "width": 16}


def stable_video() -> Made:
    seeded()
    net = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    ).eval()
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        intermediate_size=37,
        patch_size=8,
    )
    autoencoder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()
    pipe = diffusers.StableVideoDiffusionPipeline(
        unet=net,
        vae=autoencoder,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=16, size=16),
        scheduler=diffusers.EulerDiscreteScheduler(
            **LATENT,
            prediction_type="v_prediction",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
            steps_offset=1,
        ),
    )
    return pipe, {"image": torch.rand(1, 3, 16, 16), "num_frames": 2, "height": 16, "width": 16}


def animate_diff() -> Made:
    parts = _latent_parts()
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    pipe = diffusers.AnimateDiffPipeline(motion_adapter=adapter.eval(), **parts)
    pipe.unet.eval()
    return pipe, {"prompt": "a cat", "num_frames": 2, "height": 16, "width": 16, "decode_chunk_size": 2}


def unconditional(kind: type[Any], scheduler: Any) -> Made:
    seeded()
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return kind(unet=net, scheduler=scheduler), {"batch_size": 2, "output_type": "np"}


def latent_diffusion() -> Made:
    seeded()
    net = unet()
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=vae(), bert=text_encoder(length=77), tokenizer=tokenizer(77), unet=net, scheduler=ddim()
    )
    return pipe, {"prompt": ["a cat", "dog"], "height": 64, "width": 64, "guidance_scale": 3.0, "output_type": "np"}


def seeded() -> None:
    torch.manual_seed(0)
