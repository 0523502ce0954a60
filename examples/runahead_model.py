"""A decoder with random weights and a tokenizer of its own, to try chains: `python examples/runahead_model.py FOLDER`.

Prefill takes as long with random weights as with any. The tokenizer (byte-level BPE) is trained on the text that every
machine has, the sources of Python's standard library, which long prompts are taken from too.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

__all__ = ["KINDS", "make", "text"]

KINDS = ("qwen3", "llama", "mqa")
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def text(characters: int, skip: int = 0) -> str:
    """So many characters of the standard library's sources, `skip` files left out before them."""
    found: list[str] = []
    for number, content in enumerate(_sources()):
        if number >= skip:
            found.append(content)
        if sum(map(len, found)) >= characters:
            break
    return "".join(found)[:characters]


def make(
    folder: Path,
    kind: str = "qwen3",
    *,
    layers: int = 12,
    hidden: int = 1024,
    vocabulary: int = 8192,
    longest: int = 20480,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes model and tokenizer.

    Args:
        folder: Where to.
        kind: "qwen3" (8 query heads to 2 of keys and values at the default width), "llama" (MHA), or "mqa".
        layers, hidden: Of the model; heads are of 64.
        vocabulary: Of the tokenizer.
        longest: Prompt and answer, in tokens.
        dtype: Of the weights.
    """
    heads = hidden // 64
    config_type, model_type = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    config = config_type(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads={"qwen3": max(1, heads // 4), "llama": heads, "mqa": 1}[kind],
        head_dim=64,
        max_position_embeddings=longest,
        initializer_range=0.05,
        tie_word_embeddings=True,
        dtype=dtype,
        eos_token_id=0,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model_type(config).to(dtype).save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text(2_000_000)], vocab_size=vocabulary, special_tokens=["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    return folder


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(errors="replace")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    given = parser.parse_args()
    make(given.folder, given.kind, layers=given.layers, hidden=given.hidden)
    print(f"{given.folder}: a {given.kind} model; forerun runahead serve {given.folder} --engines 2")


if __name__ == "__main__":
    _main()
