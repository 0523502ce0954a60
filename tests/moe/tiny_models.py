"""Small models of random weights, of every family whose routers are known."""

import torch
import transformers

_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_LATENT = {
    **_SHAPE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
_QWEN = {**_SHAPE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "Mixtral": {**_SHAPE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**_QWEN, "head_dim": 8},
    "Olmoe": {**_SHAPE, "num_experts": 8, "num_experts_per_tok": 2},
    "DeepseekV2": {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "DeepseekV3": {**_LATENT, "q_lora_rank": 16, "n_group": 2, "topk_group": 1},
}


def tiny(family, **changes):
    """A model of the family: 8 experts, top 2; layers 0 to 2, DeepSeek's first one dense."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()
