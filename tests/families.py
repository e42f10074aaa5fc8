"""Small models of families that go about masks, experts and states in ways of their own, by model_type."""

import numpy as np

GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None}
# Prompt and response tokens of a few rows.
LENGTHS = np.array([[3, 4], [5, 2], [2, 7], [4, 4], [6, 1]])
WIDTH = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = WIDTH | {"num_attention_heads": 2}
DENSE = HEADS | {"intermediate_size": 48}
EXPERTS = DENSE | {"num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "opt": HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": HEADS | {"alibi": True},
    "mixtral": DENSE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "mamba": WIDTH | {"state_size": 4},
}
