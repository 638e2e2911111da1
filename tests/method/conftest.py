"""Tiny random models of several architectures: the mathematics is the same at any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

# Architecture → its own settings. The windows are shorter than the documents; multipliers and caps are not 1.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 16},
    "Granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {
        "sliding_window": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.3, "final_logit_softcapping": 2.0,
    },
}  # fmt: skip


def tiny_model(architecture: str, *, vocab_size: int = 97, seed: int = 0) -> Any:
    """Four layers, hidden size 32, float32, eager attention (it has second derivatives)."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_implementation="eager",
        **ARCHITECTURES.get(architecture, {}),
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # the library's small initial values would hide errors
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("Llama")
