"""Which contenders a run has."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.load_command import chosen_contenders
from regrad_vllm.load.options import parser


def test_without_a_lora_tuned_for_rag_all_others_take_part(tmp_path: Path) -> None:
    missing = tmp_path / "ft_rag"
    assert chosen_contenders(parser().parse_args([]), tmp_path) == list(CONTENDERS)
    assert chosen_contenders(parser().parse_args([]), missing) == [
        name for name in CONTENDERS if name != "ft_rag_sentence"
    ]
    named = parser().parse_args(["--contenders", "ft_rag_sentence"])
    with pytest.raises(ValueError, match=r"--contenders ft_rag_sentence needs FT-RAG's LoRA in .*ft_rag; train one"):
        chosen_contenders(named, missing)
