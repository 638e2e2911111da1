"""The recipe of an adapter. A LoRARequest carries it in its path, and the worker finds the documents by it.

The path is ``regrad:`` and canonical JSON, which names the gradients by digest. The name of the adapter is the digest
of the same content (``naming.adapter_name``). Both are the same from every API server, because vLLM keys its prefix
cache by them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from regrad_vllm.naming import adapter_name

PATH_PREFIX = "regrad:"
_VERSION = 2
# All our requests have this id in vLLM. So they count as one adapter, φ*, in vLLM's scheduler, slots and books.
ADAPTER_ID = 2**31 - 1


class RecipeError(ValueError):
    """A ``regrad:`` path isn't a recipe that this version can read."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """φ_q = φ* − gamma Σ_k weights[k] δ[digests[k]]"""

    learner: str  # fingerprint, 64 hex digits
    digests: tuple[str, ...]
    weights: tuple[float, ...]
    gamma: float

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.weights):
            raise RecipeError(f"weights must be as many as digests ({len(self.digests)}), got {len(self.weights)}")
        if not all(math.isfinite(number) for number in (self.gamma, *self.weights)):
            raise RecipeError(f"gamma and weights must be finite, got {self.gamma}, {self.weights}")

    @property
    def name(self) -> str:
        """The adapter's name in vLLM."""
        return adapter_name(self.learner, self.digests, self.weights, self.gamma)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """c of each δ: −gamma · weights[k]."""
        return tuple(-self.gamma * weight for weight in self.weights)

    @property
    def path(self) -> str:
        document = {
            "v": _VERSION,
            "learner": self.learner,
            "digests": list(self.digests),
            "weights": list(self.weights),
            "gamma": self.gamma,
        }
        return PATH_PREFIX + json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, path: str) -> Recipe:
        """The recipe in a LoRARequest's path. RecipeError if the path isn't one."""
        if not path.startswith(PATH_PREFIX):
            raise RecipeError(f"path must start with {PATH_PREFIX!r}, got {path[:40]!r}")
        try:
            document: dict[str, Any] = json.loads(path[len(PATH_PREFIX) :])
            version = document.pop("v")
            if version != _VERSION:
                raise RecipeError(f"recipe version must be {_VERSION}, got {version!r}; run one version of regrad")
            return cls(
                learner=str(document.pop("learner")),
                digests=tuple(str(digest) for digest in document.pop("digests")),
                weights=tuple(float(weight) for weight in document.pop("weights")),
                gamma=float(document.pop("gamma")),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise RecipeError(f"path must hold a recipe as JSON, got {path[:80]!r}: {error}") from error
