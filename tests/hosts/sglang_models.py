"""Small models of random weights with a tokenizer, as folders that SGLang serves; and transformers' answers."""

from __future__ import annotations

VOCABULARY = 512
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 256}
FAMILIES = {
    "Qwen3Moe": {**_SHAPE, **_EXPERTS, "head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "Qwen2Moe": {**_SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "Mixtral": {**_SHAPE, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2},
    "DeepseekV2": {
        **_SHAPE,
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
        "intermediate_size": 256,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,  # SGLang asks for these two; checkpoints name them
        "scoring_func": "softmax",
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 64,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "Olmoe": {
        **_SHAPE,
        "num_key_value_heads": 4,  # SGLang has as many of keys as of queries
        "intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen3": {**_SHAPE, "intermediate_size": 256, "head_dim": 32},
    "Llama": {**_SHAPE, "intermediate_size": 256},
}


def make_model(folder, family, **changes):
    """Writes a model of the family and a tokenizer, token t7 written "t7", id 7; returns the folder as text."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t3", "unk_token": "t0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return str(folder)


def load(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(lengths, seed=0):
    import torch

    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def continued(model, prompt, tokens):
    """The greedy continuation that transformers finds."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=3)
    return out[0, len(prompt) :].tolist()
