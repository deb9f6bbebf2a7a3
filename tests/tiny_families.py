"""Tiny random models of any causal family that transformers offers, built from its default config by shrinking it."""

from typing import Any

import torch

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "n_embd": 24, "d_model": 24, "embedding_size": 24,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 6, "n_head": 6, "n_heads": 6, "num_heads": 6, "decoder_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 40, "n_inner": 40, "ffn_dim": 40,
    "decoder_ffn_dim": 40, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_num_experts": 4, "moe_k": 2, "sliding_window": 5, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "rotary_dim": 4, "word_embed_proj_dim": 24, "max_position_embeddings": 256,
    "first_k_dense_replace": 1,
}  # fmt: skip
"""What to shrink, under the names that families use."""
LARGEST = 3_000_000
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers")


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The default config of a family, tiny; ``changes`` are made last.

    Raises:
        ValueError: the family is made of several models, or its config refuses these sizes.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    if any(isinstance(value, dict) for name, value in default.items() if name.endswith("_config")):
        raise ValueError(f"{model_type} is made of several models")
    given = {name: value for name, value in SIZES.items() if default.get(name) is not None or name in changes}
    for name in _PER_LAYER:
        if isinstance(default.get(name), list):
            kinds = list(dict.fromkeys(default[name]))
            given[name] = kinds[:2] if len(kinds) > 1 else kinds * 2
    if default.get("kv_lora_rank") is not None:
        given["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention shares no heads
    given |= {name: 0.0 for name, value in default.items() if "drop" in name and isinstance(value, float)}
    if default.get("is_decoder") is False and not default.get("is_encoder_decoder"):
        given["is_decoder"] = True
    return kind(**{**given, **changes})


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in fp32, every parameter shifted by N(0, 0.2), so that no part of it does nothing.

    Raises:
        ValueError: the family cannot be built this small.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} has {size} parameters and was not shrunk by the names known here")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products know no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
