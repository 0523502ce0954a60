"""Small language models of classic `deepspeed.moe` layers; every rank builds the same one and keeps its own experts."""

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

EXPERTS, WIDTH, LAYERS, VOCABULARY = 8, 16, 2, 64


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, rows):
        return self.down(torch.relu(self.up(rows))) * self.scale


class ClassicLM(nn.Module):
    """Token ids `[B, S]` to logits; each position sees the mean of those before it."""

    def __init__(self, ranks, **settings):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(
            MoE(WIDTH, Expert(), num_experts=EXPERTS, ep_size=ranks, **settings) for _ in range(LAYERS)
        )

    def forward(self, input_ids, used=None):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
            hidden = hidden + block(hidden + (hidden.float().cumsum(1) / count).to(hidden.dtype), used)[0]
        return self.head(hidden)


def classic(ranks, *, dtype=torch.float32, parallel=True, **settings):
    """The model with random weights that depend on an expert's number alone, in groups of so many ranks."""
    model = ClassicLM(ranks, **settings)
    local = EXPERTS // ranks
    rank = dist.get_rank() % ranks if dist.is_initialized() else 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if "deepspeed_experts" in parts:
                place = parts.index("deepspeed_experts") + 1
                parts[place] = str(rank * local + int(parts[place]))
            seed = int.from_bytes(".".join(parts).encode()[-7:], "big") + sum(map(ord, ".".join(parts)))
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.5)
        for number, block in enumerate(model.blocks):
            for place, expert in enumerate(block.deepspeed_moe.experts.deepspeed_experts):
                expert.scale.fill_(1 + 0.01 * (rank * local + place) + number)
    model = model.to(dtype).eval()
    if parallel:
        for block in model.blocks:
            block.set_deepspeed_parallelism()
    return model
