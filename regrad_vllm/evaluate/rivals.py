"""Adapters of the rival methods: tuned for RAG, pre-trained on the corpus, not meta-trained, or one per document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regrad_vllm.data.questions import EvalData
from regrad_vllm.learner import Learner, LearnerError, read_adapter, save_adapter

FT_RAG_FOLDER = "ft_rag"  # beside the learner's own files


@dataclass(frozen=True, slots=True)
class RivalSettings:
    """Settings of the methods that train on the evaluated documents. They were chosen on the split "validation"."""

    cpt_learning_rate: float = 1e-3
    prag_learning_rate: float = 1e-3
    cpt_epochs: int = 10


class Rivals:
    """Makes each adapter when it is first needed. All have the learner's layout, so no method has more parameters."""

    def __init__(
        self,
        model: Path,
        learner_folder: Path,
        learner: Learner,
        out: Path,
        ft_rag: Path | None,
        top_k: int,
        settings: RivalSettings,
    ) -> None:
        self.model = model
        self._top_k = top_k
        self.settings = settings
        self.learner_folder = learner_folder
        self.learner = learner
        self._out = out
        self._ft_rag = ft_rag or learner_folder / FT_RAG_FOLDER

    @property
    def has_ft_rag(self) -> bool:
        return self._ft_rag.is_dir()

    @cached_property
    def raw_learner(self) -> Path:
        """The folder of a learner without meta-training.

        Its φ* is LoRA's usual initialisation. Its single step size is the best one on the facts for validation.
        """
        from regrad_vllm.learn.raw import raw_learner

        folder = self._out / "raw-learner"
        raw_learner(self.learner, self.model, self._top_k).save(folder)
        return folder

    def adapter(self, method: str, data: EvalData) -> Path:
        """The PEFT folder of a method's own adapter. LearnerError if it is missing."""
        if method == "ft_rag":
            if not self.has_ft_rag:
                raise LearnerError(
                    f"{self._ft_rag} must hold the adapter of ft_rag; name its folder with --ft-rag, train one with "
                    "`regrad train` (gamma = 0, icl_share = 1), or leave ft_rag out of --methods"
                )
            return self._ft_rag
        folder = self._out / "cpt"
        if not folder.is_dir():
            from regrad_vllm.learn.continual import pretrain

            texts = [(document.title, document.text) for document in data.documents]
            rate, epochs = self.settings.cpt_learning_rate, self.settings.cpt_epochs
            adapter = pretrain(self.learner, self.model, texts, learning_rate=rate, epochs=epochs)
            save_adapter(folder, self.learner, adapter)
        return folder

    def flat_adapter(self, method: str, data: EvalData) -> NDArray[np.float32]:
        """The method's own adapter as one vector in the learner's layout, float32 (num_values,)."""
        return read_adapter(self.adapter(method, data), self.learner.layout)

    def per_document(self, data: EvalData) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, δ) for every document. δ is φ* minus its tuned LoRA, float32 (num_values,)."""
        import torch

        from regrad_vllm.base_model import fast_dtype, load_base_model
        from regrad_vllm.encode.adapted_model import AdaptedModel
        from regrad_vllm.encode.prompting import PromptBuilder
        from regrad_vllm.learn.per_document import fit_each

        device = "cuda" if torch.cuda.is_available() else "cpu"
        base, tokenizer = load_base_model(self.model, dtype=fast_dtype(device), device=device)
        model = AdaptedModel(base, self.learner.layout, self.learner.scaling)
        texts = [(document.title, document.text) for document in data.documents]
        builder = PromptBuilder(tokenizer, self.learner.config.prompts)
        yield from fit_each(model, builder, self.learner, texts, learning_rate=self.settings.prag_learning_rate)
