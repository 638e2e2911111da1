"""The type that the base model is computed in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regrad_vllm import base_model
from regrad_vllm.base_model import fast_dtype, has_wide_vectors


@pytest.mark.parametrize(
    ("flags", "wide"),
    [("fpu sse2 avx2", False), ("fpu avx2 avx512f", True), ("avx2 amx_bf16", True), ("asimd bf16 sve", True)],
)
def test_adapters_are_trained_in_bfloat16_where_the_cpu_does_not_emulate_it(
    flags: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: f"flags\t: {flags}\n")
    assert has_wide_vectors() is wide
    assert fast_dtype("cpu") is (torch.bfloat16 if wide else torch.float32)
    assert fast_dtype("cuda") is torch.bfloat16


def test_where_the_system_does_not_tell_vllms_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(base_model.Path, "read_text", refuse)
    assert has_wide_vectors() and fast_dtype("cpu") is torch.bfloat16
