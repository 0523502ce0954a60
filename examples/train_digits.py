"""Train the small UNet that the examples sample from: scikit-learn's digits, real 8x8 handwriting, minutes on 2 cores.

Writes a diffusers pipeline folder (`--out`, default `examples/assets/digits`) and beside it `training.json` with the
loss on digits held out of the training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from rich.progress import track
from sklearn.datasets import load_digits

ASSETS = Path(__file__).parent / "assets" / "digits"


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits as `[n, 1, 8, 8]` in [-1, 1]: 1,617 to train on, 180 held out."""
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[180:]], pixels[order[:180]]


def denoiser() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        dropout=0.1,
    )


def noise_loss(
    unet: UNet2DModel, scheduler: DDIMScheduler, clean: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the predicted noise at uniform timesteps."""
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
    return torch.nn.functional.mse_loss(predicted, noise)


@torch.no_grad()
def held_out_loss(unet: UNet2DModel, scheduler: DDIMScheduler, held_out: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(1)
    unet.eval()
    losses = [noise_loss(unet, scheduler, held_out, generator) for _ in range(20)]
    unet.train()
    return float(torch.stack(losses).mean())


def train(steps: int, batch: int, out: Path) -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    training, held_out = images()
    unet = denoiser()
    scheduler = DDIMScheduler(clip_sample=False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    ema = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    start = time.perf_counter()
    for _ in track(range(steps), description="training"):
        clean = training[torch.randint(0, len(training), (batch,), generator=generator)]
        loss = noise_loss(unet, scheduler, clean, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    unet.eval()
    result = {
        "steps": steps,
        "batch": batch,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "held_out_loss": round(held_out_loss(unet, scheduler, held_out), 5),
    }
    DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    print(json.dumps(train(options.steps, options.batch, options.out)))
