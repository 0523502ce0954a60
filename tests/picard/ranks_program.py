"""What the process-group test starts on every rank: a real pipeline, its window split over the ranks.

python ranks_program.py RANK SIZE STORE OUT [die RANK CALL | other-noise]
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from forerun.picard.diffusers import PicardScheduler


def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    pipe = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DDIMPipeline, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = pipe(batch_size=2, num_inference_steps=16, generator=generator, eta=0.5, output_type="np").images
    return torch.as_tensor(images)


def deliver(rank: int, out: str, deed: list[str]) -> None:
    pipe = pipeline()
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe.scheduler = PicardScheduler.from_pipe(pipe, distributed=True, timeout=10, tolerance=1e-5, check_cost=False)
    if deed[:2] == ["die", str(rank)]:
        call = int(deed[2])
        pipe.unet.register_forward_pre_hook(lambda module, args: os._exit(9) if len(rows) == call else None)
    images = sample(pipe, seed=3 + (rank if deed == ["other-noise"] else 0))
    torch.save({"images": images, "rows": rows, "rounds": pipe.scheduler.report.rounds}, f"{out}.{rank}")


def main() -> None:
    rank, size, store, out, *deed = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
    )
    try:
        deliver(int(rank), out, deed)
    finally:
        # Else gloo's threads, still letting go of tensors, may abort the process while the interpreter ends.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
