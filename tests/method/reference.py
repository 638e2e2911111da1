"""The slow obvious versions: Hugging Face PEFT holds the adapter, one document at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from regrad_vllm.layout import Layout


def peft_model(model: Any, layout: Layout, scaling: float) -> Any:
    """A PEFT model whose LoRA modules are the layout's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=layout.rank, lora_alpha=scaling * layout.rank, target_modules=list(layout.modules))
    return get_peft_model(model, config).eval()


def peft_parameters(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    return {
        f"base_model.model.{tensor.module}.lora_{tensor.part}.default.weight": view
        for tensor, view in layout.views(flat)
    }


def lm_loss(peft: Any, layout: Layout, flat: Tensor, tokens: list[int], start: int = 1) -> Tensor:
    """Mean next-token cross-entropy of tokens[start:], by the library's own loss."""
    ids = torch.tensor([tokens])
    labels = ids.clone()
    labels[:, :start] = -100
    out = functional_call(peft, peft_parameters(layout, flat), kwargs={"input_ids": ids, "labels": labels})
    return out.loss


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
