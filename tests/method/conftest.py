"""Tiny random models of several architectures: the mathematics is the same at any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral")


def tiny_model(architecture: str, *, vocab_size: int = 97, seed: int = 0) -> Any:
    """Four layers, hidden size 32, float32, eager attention (it has second derivatives)."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{architecture}Config")
    extra: dict[str, Any] = {"sliding_window": 16} if architecture == "Mistral" else {}
    config = config_class(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_implementation="eager", **extra,
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
