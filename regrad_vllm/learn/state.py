"""The state of meta-training: φ*, step sizes and optimiser."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrad_vllm.encode.inner_loss import InnerLoss
from regrad_vllm.layout import Layout
from regrad_vllm.learn.meta_step import MetaParameters
from regrad_vllm.learn.train_config import ConfigError, TrainConfig
from regrad_vllm.learner import Learner, LearnerConfig, num_step_sizes

_LOG = logging.getLogger(__name__)


class MetaState:
    """Everything that a meta-step changes: φ*, step sizes and optimiser."""

    def __init__(self, config: TrainConfig, layout: Layout, hidden_size: int, device: torch.device) -> None:
        self.config, self.layout = config, layout
        self.step = 0
        self.seconds: dict[str, float] = {}  # training time by machine
        self.origin = ""  # digest of the run's inputs beside its config: base model, data, start
        generator = torch.Generator().manual_seed(config.seed)
        self.phi = initial_phi(layout, generator).to(device).requires_grad_()
        count = num_step_sizes(config.step_size_kind, layout)
        self.step_sizes = torch.full((config.inner_steps * count,), config.step_size_init, device=device)
        groups: list[dict[str, Any]] = [{"params": [self.phi], "lr": config.learning_rate}]
        if config.step_size_kind != "fix":
            self.step_sizes.requires_grad_()
            groups.append({"params": [self.step_sizes], "lr": config.step_size_learning_rate})
        self.token_head: Tensor | None = None
        if config.token_weights:
            self.token_head = torch.zeros(hidden_size + 1, device=device, requires_grad=True)
            groups.append({"params": [self.token_head], "lr": config.learning_rate})
        self.log_temperature: Tensor | None = None
        if config.score_temperature_init:
            self.log_temperature = torch.tensor(math.log(config.score_temperature_init), device=device)
            self.log_temperature.requires_grad_()
            groups.append({"params": [self.log_temperature], "lr": config.step_size_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self._rates = [group["lr"] for group in groups]

    def start_from(self, learner: Learner) -> None:
        """Takes φ*, step sizes and inner loss from a learner. A lower rank is extended; the function stays the same.

        New inner steps begin with step_size_init. ConfigError if the modules or the kind of step sizes differ, or if
        learnt weights would be lost. ConfigError also if the learner has a higher rank or more inner steps.
        """
        self._check_start(learner)
        self.take_phi(learner)
        with torch.no_grad():
            self.step_sizes[: len(learner.step_sizes)] = torch.tensor(learner.step_sizes)
            if self.token_head is not None and learner.token_head is not None:
                self.token_head.copy_(torch.tensor(learner.token_head))
            if self.log_temperature is not None and learner.config.score_temperature:
                self.log_temperature.fill_(math.log(learner.config.score_temperature))

    def take_phi(self, learner: Learner) -> None:
        """Takes only φ* from a learner, not its step sizes. ConfigError if it doesn't fit."""
        ours, theirs = self.layout, learner.layout
        self._check_modules(learner)
        with torch.no_grad():
            for (tensor, mine), (_, given) in zip(
                ours.views(self.phi), theirs.views(torch.tensor(learner.phi)), strict=True
            ):
                if tensor.part == "A":  # additional rows keep their random values, because their columns in B are 0
                    mine[: theirs.rank] = given.to(mine.device)
                else:
                    # The scaling lora_alpha / r differs, because r differs.
                    mine[:, : theirs.rank] = given.to(mine.device) * (learner.scaling / self._scaling)

    def _check_modules(self, learner: Learner) -> None:
        ours, theirs = self.layout, learner.layout
        if theirs.modules != ours.modules or theirs.rank > ours.rank:
            raise ConfigError(
                f"start must be a learner of the same modules and at most rank {ours.rank}, it has rank {theirs.rank} "
                f"and {len(theirs.modules)} modules from {theirs.modules[0]} to {theirs.modules[-1]}"
            )

    def _check_start(self, learner: Learner) -> None:
        if learner.config.inner_steps > self.config.inner_steps:
            raise ConfigError(f"inner_steps must be at least the start's, {learner.config.inner_steps}")
        if learner.config.score_temperature and self.log_temperature is None:
            raise ConfigError("score_temperature_init must be above 0: the start weights documents by their scores")
        if learner.token_head is not None and self.token_head is None:
            raise ConfigError("token_weights must be true: the start weights a document's tokens")
        if learner.config.step_size_kind != self.config.step_size_kind:
            raise ConfigError(f"step_size_kind must be the start's, {learner.config.step_size_kind!r}")
        rank = learner.layout.rank
        if learner.config.step_size_kind == "full" and rank != self.layout.rank:
            raise ConfigError(f"rank must be the start's, {rank}, with step sizes of kind 'full'")

    @property
    def _scaling(self) -> float:
        return self.config.lora_alpha / self.layout.rank

    def parameters(self) -> MetaParameters:
        """The parameters for the loss. Gradients flow back to this state."""
        temperature = None if self.log_temperature is None else self.log_temperature.exp()
        inner_loss = InnerLoss(self.config.length_exponent, self.token_head)
        return MetaParameters(self.phi, self.step_size_tensors(), self.config.gamma, inner_loss, temperature)

    def step_size_tensors(self) -> list[list[Tensor]]:
        """For each inner step and each tensor of the layout: a scalar, or a tensor of its shape for "full"."""
        return [self._of_one_step(sizes) for sizes in self.step_sizes.view(self.config.inner_steps, -1)]

    def _of_one_step(self, sizes: Tensor) -> list[Tensor]:
        kind = self.config.step_size_kind
        if kind == "full":
            return [view for _, view in self.layout.views(sizes)]
        if kind == "tie":
            return list(sizes.unbind())
        return [sizes[0]] * len(self.layout.tensors)

    def update(self, loss: Tensor) -> dict[str, float]:
        """One optimiser step, with warm-up and linear decay. The norms of φ* and step sizes are clipped separately."""
        torch.autograd.backward(loss)
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip_norm))
            for group in self.optimizer.param_groups
        ]
        warmup = max(1, int(self.config.num_steps * self.config.warmup_share))
        left = max(0.0, (self.config.num_steps - self.step) / max(1, self.config.num_steps - warmup))
        factor = min((self.step + 1) / warmup, left)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if all(np.isfinite(norm) for norm in norms):
            self.optimizer.step()
        else:
            _LOG.warning("step %d: the meta-gradient is not finite; the step is left out", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"grad_norm": norms[0], "learning_rate_factor": factor}

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "config": self.config.digest,
                "origin": self.origin,
                "phi": self.phi.detach(),
                "step_sizes": self.step_sizes.detach(),
                "token_head": None if self.token_head is None else self.token_head.detach(),
                "log_temperature": None if self.log_temperature is None else self.log_temperature.detach(),
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint. ConfigError if another config made it."""
        saved = torch.load(path, weights_only=True, map_location=self.phi.device)
        if saved.get("config") != self.config.digest:
            raise ConfigError(
                f"{path} must be of this config ({self.config.digest[:16]}), it is of another "
                f"({str(saved.get('config'))[:16]}); restore the config that began the run, or use another output"
            )
        if saved.get("origin") != self.origin:
            raise ConfigError(f"{path} must go on with the base model, data and start that it was begun with")
        with torch.no_grad():
            self.phi.copy_(saved["phi"])
            self.step_sizes.copy_(saved["step_sizes"])
            if self.token_head is not None:
                self.token_head.copy_(saved["token_head"])
            if self.log_temperature is not None:
                self.log_temperature.copy_(saved["log_temperature"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def to_learner(self, digest: str, training: dict[str, object]) -> Learner:
        config = self.config
        learner_config = LearnerConfig(
            base_digest=digest,
            lora_alpha=config.lora_alpha,
            step_size_kind=config.step_size_kind,
            prompts=config.prompts,
            max_document_tokens=config.max_document_tokens,
            top_k=config.top_k,
            gamma=config.gamma,
            inner_steps=config.inner_steps,
            length_exponent=config.length_exponent,
            score_temperature=0.0 if self.log_temperature is None else float(self.log_temperature.detach().exp()),
            training=training,
        )
        phi, step_sizes = (values.detach().cpu().numpy().copy() for values in (self.phi, self.step_sizes))
        head = None if self.token_head is None else self.token_head.detach().cpu().numpy().copy()
        return Learner(learner_config, self.layout, phi, step_sizes, head)


def initial_phi(layout: Layout, generator: torch.Generator) -> Tensor:
    """LoRA's usual initialisation: A uniform by fan-in (Kaiming, a = √5), B zero."""
    phi = torch.zeros(layout.num_values)
    for tensor, view in layout.views(phi):
        if tensor.part == "A":
            bound = tensor.shape[1] ** -0.5
            view.uniform_(-bound, bound, generator=generator)
    return phi
