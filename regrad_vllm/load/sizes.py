"""What one request holds in the engine, in bytes, and the type to compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrad_vllm.learner import Learner

_BYTES = {"float32": 4, "bfloat16": 2}
_BLOCK_TOKENS = 16  # where the server doesn't tell


def default_dtype() -> str:
    """bfloat16 where `regrad serve` leaves vLLM its choice, float32 on CPUs that are slow at it."""
    import torch

    from regrad_vllm.base_model import fast_dtype

    return str(fast_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")


def served_dtype(server: str) -> str:
    """What a running server has its LoRA slots in, which is the model's own type unless it was told another.

    httpx.HTTPError; ValueError where it has no ReGrad or another type.
    """
    import httpx

    response = httpx.get(f"{server}/v1/regrad/status", timeout=30)
    found = str(response.json().get("lora_dtype", "")).removeprefix("torch.") if response.is_success else ""
    if found not in _BYTES:
        raise ValueError(f"{server} must serve ReGrad in {' or '.join(_BYTES)}, got {found or response.status_code}")
    return found


def sizes(model: Path, learner: Learner, dtype: str, server: str) -> dict[str, int]:
    """KV cache of a token, tokens of its blocks, and a LoRA slot of the learner's rank. httpx.HTTPError."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {
        "kv_bytes_per_token": 2 * config.num_hidden_layers * kv_heads * head * _BYTES[dtype],
        "kv_block_tokens": _block_tokens(server),
        "adapter_bytes": learner.layout.num_values * _BYTES[dtype],
    }


def _block_tokens(server: str) -> int:
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    text = httpx.get(f"{server}/metrics", timeout=30).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "block_size" in sample.labels and sample.labels["block_size"].isdigit():
                return int(sample.labels["block_size"])
    return _BLOCK_TOKENS
