"""Everything that a meta-step changes: φ*, step sizes, optimiser."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrad_vllm.layout import Layout
from regrad_vllm.learn.config import ConfigError, TrainConfig
from regrad_vllm.learner import Learner, LearnerConfig, num_step_sizes

_LOG = logging.getLogger(__name__)


class MetaState:
    """φ*, step sizes and optimiser: everything that a step changes."""

    def __init__(self, config: TrainConfig, layout: Layout, device: torch.device) -> None:
        self.config, self.layout = config, layout
        self.step = 0
        self.seconds = 0.0
        generator = torch.Generator().manual_seed(config.seed)
        self.phi = _initial_phi(layout, generator).to(device).requires_grad_()
        count = num_step_sizes(config.step_size_kind, layout)
        self.step_sizes = torch.full((count,), config.step_size_init, device=device)
        groups: list[dict[str, Any]] = [{"params": [self.phi], "lr": config.learning_rate}]
        if config.step_size_kind != "fix":
            self.step_sizes.requires_grad_()
            groups.append({"params": [self.step_sizes], "lr": config.step_size_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self._rates = [group["lr"] for group in groups]

    def step_size_tensors(self) -> list[Tensor]:
        """Per tensor of the layout: a scalar, or for "full" the tensor's shape."""
        kind = self.config.step_size_kind
        if kind == "full":
            return [view for _, view in self.layout.views(self.step_sizes)]
        if kind == "tie":
            return list(self.step_sizes.unbind())
        return [self.step_sizes[0]] * len(self.layout.tensors)

    def update(self, loss: Tensor) -> dict[str, float]:
        """Backward, clip φ* and step sizes each by its norm, one optimiser step with warm-up and linear decay."""
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
                "phi": self.phi.detach(),
                "step_sizes": self.step_sizes.detach(),
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint; ConfigError where another config made it."""
        saved = torch.load(path, weights_only=True, map_location=self.phi.device)
        if saved.get("config") != self.config.digest:
            raise ConfigError(
                f"{path} must be of this config ({self.config.digest[:16]}), it is of another "
                f"({str(saved.get('config'))[:16]}); restore the config that began the run, or use another output"
            )
        with torch.no_grad():
            self.phi.copy_(saved["phi"])
            self.step_sizes.copy_(saved["step_sizes"])
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
            training=training,
        )
        phi, step_sizes = (values.detach().cpu().numpy().copy() for values in (self.phi, self.step_sizes))
        return Learner(learner_config, self.layout, phi, step_sizes)


def _initial_phi(layout: Layout, generator: torch.Generator) -> Tensor:
    """LoRA's usual start: A uniform by fan-in (Kaiming, a = √5), B zero."""
    phi = torch.zeros(layout.num_values)
    for tensor, view in layout.views(phi):
        if tensor.part == "A":
            bound = tensor.shape[1] ** -0.5
            view.uniform_(-bound, bound, generator=generator)
    return phi
