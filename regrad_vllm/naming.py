"""Every name, digest and fingerprint of the project. A name is a digest of the content.

vLLM keys its prefix cache by an adapter's name. So equal names must mean equal gradients and weights, and others must
get other names. Counters can't guarantee that.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence

ADAPTER_PREFIX = "regrad-"
MODEL_SUFFIX = "-regrad"
BANK_READY = "bank ready at "  # the start of the line that `regrad bank` prints when it is ready


def digest_json(value: object) -> str:
    """SHA-256 of ``value`` as canonical JSON, 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def learner_fingerprint(parts: Mapping[str, object]) -> str:
    """The fingerprint of a learner, 64 hex digits over everything that a gradient's meaning depends on."""
    return digest_json({"kind": "regrad.learner.v1", **parts})


def adapter_name(fingerprint: str, digests: Sequence[str], weights: Sequence[float], gamma: float) -> str:
    """The name of φ_q: a digest of the learner, the gradients in order, their weights and gamma.

    The order counts, because a sum in another order differs in its last bits. Weights and gamma count as IEEE-754
    doubles, so that different values never share a text.
    """
    if len(digests) != len(weights):
        raise ValueError(f"weights must be as many as digests ({len(digests)}), got {len(weights)}")
    state = hashlib.sha256(b"regrad.adapter.v1\0" + fingerprint.encode() + struct.pack("<d", gamma))
    for digest, weight in zip(digests, weights, strict=True):
        state.update(digest.encode() + struct.pack("<d", weight))
    return ADAPTER_PREFIX + state.hexdigest()[:40]
