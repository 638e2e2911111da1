from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regrad_vllm.learn.material import EMPTY, make_sampler
from regrad_vllm.learn.train_config import TrainConfig


def test_texts_are_embedded_only_where_hits_or_scores_count(tmp_path: Path) -> None:
    alone = TrainConfig(
        base_model="", output=str(tmp_path), first_layer=2, num_synthetic=5, score_temperature_init=0.1,
        neighbour_share=0.0, top_k_weights=(1.0,), icl_share=0.5, cue_share=0.5,
    )  # fmt: skip
    for config, retrieved in (
        (alone, False),
        (replace(alone, top_k_weights=(1.0, 0.0)), False),
        (replace(alone, top_k_weights=(0.5, 0.5)), True),
        (replace(alone, top_k_weights=(0.5, 0.5), score_temperature_init=0.0), False),
        (replace(alone, neighbour_share=0.5), True),
    ):
        sampler = make_sampler(config, "train", EMPTY, tmp_path)
        assert (sampler.sets[0].retrieval is not None) is retrieved
    assert {sampler.plan(step).text for step in range(10)} == {"icl", "cue"}
