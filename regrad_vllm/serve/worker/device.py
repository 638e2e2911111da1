"""The device of a worker: where documents lie for its kernels, and what the kernels learn about each step.

A CPU and a CUDA GPU differ in nothing else. Pool, door and steps know only this protocol.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from bank_service.wire.codecs.factors import is_factors
from bank_service.wire.record import (
    DEFAULT_CODEC,
    Buffer,
    GradientFormatError,
    GradientSpec,
    decode_gradient,
    encode_gradient,
    verify_record,
)

if TYPE_CHECKING:
    from regrad_vllm.serve.kernels.batch import BatchDocuments

_MOST_FACTORS = 99  # of a tensor, in any codec
_LOGGER = logging.getLogger("regrad")


class NoMemory(RuntimeError):
    """The device has no memory for a document. The message says what to change."""


@dataclass(frozen=True, slots=True)
class Resident:
    """One document in the memory that the kernels read."""

    address: int  # of the first byte of its payload
    form: int  # the index of its codec's form in the worker's ``Forms``
    num_bytes: int  # that it takes of --regrad-worker-bytes
    memory: object  # keeps the bytes at ``address`` as they are


class Device(Protocol):
    """A worker's device. It is made when vLLM has made its LoRA layers, on the thread that runs the steps."""

    @property
    def refusal(self) -> str:
        """The reason why ReGrad can't be served on this worker, with the remedy. Empty if it can."""

    @property
    def max_documents(self) -> int:
        """The most documents that the pool may keep, whatever their bytes."""

    def load(self, arena: str, digest: str) -> Resident:
        """A checked record of an arena. Called on any thread.

        The kernels of a step that is set after the call must find the whole payload. A copy may still run when the
        call returns, if they wait for it. A record of a codec without factors is turned into factors here.

        NoMemory, ArenaMissing, ArenaCorrupt, ArenaError. GradientFormatError for a sound record that can't be used,
        such as one of another learner.
        """

    def forget(self, resident: Resident) -> None:
        """The pool has dropped a document. Its bytes may be used again once the steps that were set have ended."""

    def set_batch(self, batch: BatchDocuments | None) -> None:
        """The documents of the rows of the step that begins. None: no row has any.

        Called before every forward pass, dummy runs and graph captures too, on the thread that runs the steps.
        """


def as_factors(record: Buffer, spec: GradientSpec) -> tuple[Buffer, str]:
    """The record itself if it has factors, else a record made of it, and the codec. GradientFormatError.

    A made record has all factors that its tensors have, in 8 bits. Making it takes some of the worker's time.
    The caller has compared its bytes with its digest. So its own checksum, which the bank has compared, is skipped.
    """
    codec = verify_record(record, spec, with_checksum=False).codec
    if is_factors(codec):
        return record, codec
    rank = spec.shapes[0][0]
    remedy = f"run `regrad recode {DEFAULT_CODEC}` on the bank"
    if rank > _MOST_FACTORS:
        raise GradientFormatError(f"a gradient in {codec} must have rank {_MOST_FACTORS} at most, got {rank}; {remedy}")
    _warn_once(f"gradients in {codec} get factors each time a worker loads them, which is slow; {remedy}")
    made = f"factors-{rank}-{rank}-8"
    return encode_gradient(decode_gradient(record, spec), spec, made), made


@cache
def _warn_once(message: str) -> None:
    _LOGGER.warning(message)
