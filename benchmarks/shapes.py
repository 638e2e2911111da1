"""Base models and learners with real shapes and random weights, to measure costs, which don't depend on weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig

RANK = 16
Shape = dict[str, int]
SMOLLM2_135M: Shape = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
}  # fmt: skip
LLAMA_1B: Shape = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
}  # fmt: skip
LLAMA_8B: Shape = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip


def write_model(folder: Path, shape: Shape) -> None:
    """Writes a folder with only a config, which vLLM loads with ``load_format="dummy"``."""
    from transformers import LlamaConfig

    LlamaConfig(
        **shape, architectures=["LlamaForCausalLM"], tie_word_embeddings=True, max_position_embeddings=8192
    ).save_pretrained(folder)


def made_up_learner(shape: Shape, phi_scale: float = 0.0) -> Learner:
    """A learner for the MLPs of the upper half. φ* is zero, or normal with the deviation ``phi_scale`` and seed 0."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    layout = Layout.build(
        RANK,
        [
            (f"model.layers.{layer}.mlp.{name}", *size)
            for layer in range(layers // 2, layers)
            for name, size in sizes.items()
        ],
    )
    phi = np.random.default_rng(0).standard_normal(layout.num_values, np.float32) * np.float32(phi_scale)
    config = LearnerConfig(base_digest="0" * 64, lora_alpha=32.0, step_size_kind="tie")
    return Learner(config, layout, phi, np.ones(len(layout.tensors), np.float32))
