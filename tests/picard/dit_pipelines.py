"""Tiny real diffusers pipelines around a transformer, with random weights; see `pipelines.py`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from pipelines import LATENT, Made, brief, seeded, vae
from torch import Tensor


def stable_diffusion_3() -> Made:
    seeded()
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    ).eval()
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        **dict.fromkeys(texts),
    )
    return pipe, {**_embeds(7, 32, negative=True), **_embeds(64, negative=True, pooled=True), "height": 16, "width": 16}


def flux(**call: Any) -> Made:
    seeded()
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipe = diffusers.FluxPipeline(
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )
    guided = "true_cfg_scale" in call
    embeds = {**_embeds(7, 32, negative=guided), **_embeds(32, negative=guided, pooled=True)}
    return pipe, {**embeds, "height": 16, "width": 16, **call}


def pixart() -> Made:
    seeded()
    net = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    ).eval()
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=net,
        scheduler=diffusers.DPMSolverMultistepScheduler(**LATENT),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.int64)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    sized = {"height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, {"negative_prompt": None, **_embeds(7, 32, negative=True), **masks, **sized}


def wan(experts: int = 1, **config: Any) -> Made:
    seeded()
    nets = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()
        for _ in range(experts)
    ]
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    second = {"transformer_2": nets[1]} if experts == 2 else {}
    pipe = diffusers.WanPipeline(
        transformer=nets[0],
        **second,
        vae=autoencoder,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=None,
        tokenizer=None,
        **config,
    )
    return pipe, {**_embeds(7, 32, negative=True), "height": 32, "width": 32, "num_frames": 5}


def cogvideox() -> Made:
    seeded()
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    ).eval()
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = diffusers.CogVideoXPipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, {**_embeds(7, 32, negative=True), "height": 16, "width": 16, "num_frames": 9}


def stable_audio() -> Made:
    seeded()
    net = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    ).eval()
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    ).eval()
    texts = transformers.T5Config(vocab_size=8, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipe = diffusers.StableAudioPipeline(
        transformer=net,
        vae=autoencoder,
        text_encoder=transformers.T5EncoderModel(texts).eval(),
        projection_model=diffusers.StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
        ).eval(),
        tokenizer=None,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
    mask = torch.ones(2, 7, dtype=torch.int64)
    return pipe, {
        **_embeds(7, 32, negative=True),
        "attention_mask": mask,
        "negative_attention_mask": mask,
        "audio_end_in_s": 0.5,
    }


def dit() -> Made:
    seeded()
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=net, vae=vae(), scheduler=brief(diffusers.DDIMScheduler))
    return pipe, {"class_labels": [1, 2], "output_type": "np"}


def _embeds(*shape: int, negative: bool = False, pooled: bool = False) -> dict[str, Tensor]:
    name = "pooled_prompt_embeds" if pooled else "prompt_embeds"
    names = [name, f"negative_{name}"] if negative else [name]
    return {name: torch.randn(2, *shape) for name in names}
