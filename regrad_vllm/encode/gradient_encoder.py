"""The bank's encoder: text → δ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bank_service.values.encoder import EncodedDocument
from regrad_vllm.base_model import base_digest, fast_dtype, load_base_model
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.document_gradients import document_deltas
from regrad_vllm.encode.inner_loss import InnerLoss
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learner import Learner, LearnerError

# Limits the memory of one backward pass. Larger passes are not faster, because all cores are busy already.
_MAX_TOKENS_PER_PASS = 2048
_MAX_ROWS_PER_PASS = 32


class GradientEncoder:
    """δ_d = a ⊙ ∇φ L_LM(φ*; d) for batches of documents. Implements ``bank_service.values.encoder.Encoder``."""

    def __init__(
        self,
        model: AdaptedModel,
        builder: PromptBuilder,
        learner: Learner,
        load: Callable[[Path], GradientEncoder] | None = None,
    ) -> None:
        """load: makes the encoder of another learner of this base model."""
        self._load = load
        self.learner = learner
        self.spec = learner.spec
        self._model = model
        self._builder = builder
        self._phi = torch.tensor(learner.phi, device=model.device)
        head = None if learner.token_head is None else torch.tensor(learner.token_head, device=model.device)
        self._inner_loss = InnerLoss(learner.config.length_exponent, head)
        self._step_sizes = torch.tensor(learner.expand_step_sizes(), device=model.device)

    @classmethod
    def load(
        cls,
        model_folder: str | Path,
        learner_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> GradientEncoder:
        """Loads model and learner. LearnerError, with both digests, if they don't belong together.

        dtype: the base model's type; by default the faster one on this device, ``fast_dtype``. device: by default the
        GPU if the machine has one.
        """
        learner = Learner.load(learner_folder)
        check_base(learner, model_folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or fast_dtype(device)
        base, tokenizer = load_base_model(model_folder, dtype=dtype, device=device)
        model = AdaptedModel(base, learner.layout, learner.scaling)
        load = partial(cls.load, model_folder, dtype=dtype, device=device)
        return cls(model, PromptBuilder(tokenizer, learner.config.prompts), learner, load)

    def of_learner(self, folder: Path) -> GradientEncoder:
        """An encoder of another learner. It loads the base model once more. LearnerError.

        TypeError for an encoder that was not made by ``load``.
        """
        if self._load is None:
            raise TypeError("the encoder must be made by GradientEncoder.load to load another learner")
        return self._load(folder)

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        """δ of each (title, text), in order. Long documents are cut at the learner's max_document_tokens.

        ValueError for a document without any token.
        """
        limit = self.learner.config.max_document_tokens
        tokenised = [self._builder.document(title, text, limit) for title, text in documents]
        encoded: list[EncodedDocument | None] = [None] * len(documents)
        for indices in plan_passes([len(tokens) for tokens, _ in tokenised]):
            batch = TokenBatch.pad([(tokenised[index][0], 1) for index in indices], self._model.device)
            deltas = document_deltas(self._model, self._phi, self._step_sizes, batch, self._inner_loss).cpu().numpy()
            for row, index in enumerate(indices):
                tokens, truncated = tokenised[index]
                # The row is copied, because a view would keep the whole pass in memory.
                encoded[index] = EncodedDocument(deltas[row].copy(), len(tokens), truncated)
        return [entry for entry in encoded if entry is not None]


def check_base(learner: Learner, model_folder: str | Path) -> None:
    """LearnerError unless the learner was made for the model in ``model_folder``. Reads the whole model."""
    found = base_digest(model_folder)
    if found != learner.config.base_digest:
        raise LearnerError(
            f"the learner was made for the base model {learner.config.base_digest}, {model_folder} is {found}; "
            "use that base model, or train a learner for this one with `regrad train`"
        )


def plan_passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The indices of the documents for each backward pass. Documents of like length go together, to save padding."""
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Lengths ascend, so the newest document is the longest.
        full = len(chosen) == _MAX_ROWS_PER_PASS or (len(chosen) + 1) * lengths[index] > _MAX_TOKENS_PER_PASS
        if chosen and full:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen
