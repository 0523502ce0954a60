"""Train a small OLMoE on the standard library's sources, until its routing is its own: minutes on one core.

Every Python brings the text: its library's modules, and its documentation's topics (`pydoc_data`). Writes a
transformers folder (`--out`, default `examples/assets/tiny_moe`): the model in bfloat16, its tokenizer, and
`training.json` with the loss on files held out of the training and how evenly each layer's experts are used.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets" / "tiny_moe"
_END = "<|endoftext|>"
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def sources() -> tuple[list[str], list[str]]:
    """Texts of the standard library's modules: those to train on, and about one in twenty held out."""
    library = Path(sysconfig.get_path("stdlib"))
    texts: tuple[list[str], list[str]] = ([], [])
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if not _SKIPPED & set(name.parts):
            texts[zlib.crc32(name.as_posix().encode()) % 20 == 0].append(file.read_text(errors="replace"))
    return texts


def tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END)


def as_stream(texts: list[str], words: PreTrainedTokenizerFast) -> Tensor:
    """`[n]` token ids of all texts, an end mark after each."""
    encoded = words(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for text in encoded for token in (*text, words.eos_token_id)])


def model(vocabulary: int, end: int) -> OlmoeForCausalLM:
    """OLMoE's shape, small: 4 layers of 16 experts, 4 of them a token."""
    torch.manual_seed(0)
    net = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=16,
            num_experts_per_tok=4,
            max_position_embeddings=512,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=None,
            use_cache=False,
        )
    )
    net.set_experts_implementation("eager")  # the grouped product's backward pass takes several times as long on a CPU
    return net


def windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`[count, length]` random pieces of the stream."""
    starts = torch.randint(0, len(stream) - length, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)]


@torch.no_grad()
def held_out(net: OlmoeForCausalLM, stream: Tensor, length: int) -> dict[str, Any]:
    """Loss (nats a token) on the held-out stream, and by layer the busiest expert's load over the mean."""
    net.eval()
    pieces = stream[: len(stream) // length * length].view(-1, length)[:128]
    losses, chosen = [], torch.zeros(net.config.num_hidden_layers, net.config.num_experts)
    for piece in pieces.split(8):
        out = net(piece, labels=piece, output_router_logits=True)
        losses.append(float(out.loss - net.config.router_aux_loss_coef * out.aux_loss))
        for layer, logits in enumerate(out.router_logits):
            picked = logits.topk(net.config.num_experts_per_tok).indices.flatten()
            chosen[layer] += torch.bincount(picked, minlength=net.config.num_experts)
    net.train()
    return {
        "held_out_loss": round(sum(losses) / len(losses), 4),
        "expert_load": [round(float(load.max() / load.mean()), 3) for load in chosen],
    }


def train(steps: int, batch: int, length: int, vocabulary: int, out: Path) -> dict[str, Any]:
    texts, kept = sources()
    words = tokenizer(texts, vocabulary)
    stream, other = as_stream(texts, words), as_stream(kept, words)
    net = model(len(words), words.eos_token_id)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    start = time.perf_counter()
    for _ in track(range(steps), description="training"):
        piece = windows(stream, batch, length, generator)
        loss = net(piece, labels=piece, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    net = net.to(torch.bfloat16).float()  # as it will be read
    result = {
        "steps": steps,
        "tokens_a_step": batch * length,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "training_tokens": len(stream),
        **held_out(net, other, length),
    }
    net.config.use_cache = True
    net.to(torch.bfloat16).save_pretrained(out)
    words.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    print(json.dumps(train(options.steps, options.batch, options.length, options.vocabulary, options.out)))
