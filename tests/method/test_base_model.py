"""How the base model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regrad_vllm import base_model
from regrad_vllm.base_model import fast_dtype, has_wide_vectors, load_base_model
from regrad_vllm.default_model import ensure_default_model
from tests.method.conftest import tiny_model


def test_a_soft_cap_in_the_attention_is_in_the_loaded_model(tmp_path: Path) -> None:
    model = tiny_model("Gemma2")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ensure_default_model() / name).read_bytes())
    loaded, _ = load_base_model(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    model.config.attn_logit_softcapping = None
    model.save_pretrained(tmp_path)
    uncapped, _ = load_base_model(tmp_path, dtype=torch.float32)
    assert uncapped.config._attn_implementation == "sdpa", "it is faster"
    assert not torch.allclose(uncapped(ids).logits, model(ids).logits, atol=1e-2), "the cap counts"


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
