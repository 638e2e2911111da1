"""The device of a worker: where documents lie for its kernels, and what the kernels learn about each step.

A CPU and a CUDA GPU differ in nothing else. Pool, door and steps know only this protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bank_service.wire.codecs.factors import is_factors
from bank_service.wire.record import Buffer, GradientSpec, decode_gradient, encode_gradient, verify_record

if TYPE_CHECKING:
    from regrad_vllm.serve.kernels.batch import BatchDocuments

# A record of a codec without factors gets these, until `regrad recode` gives factors to its collection.
MADE_CODEC = "factors-16-16-8"


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

    def load(self, arena: str, digest: str) -> Resident:
        """A checked record of an arena. Called on any thread.

        The kernels of a step that is set after the call must find the whole payload. A copy may still run when the
        call returns, if they wait for it. A record of a codec without factors is turned into factors here.

        ArenaError if the arena has no such record. GradientFormatError if it is damaged or of another learner.
        """

    def forget(self, resident: Resident) -> None:
        """The pool has dropped a document. Its bytes may be used again once the steps that were set have ended."""

    def set_batch(self, batch: BatchDocuments | None) -> None:
        """The documents of the rows of the step that begins. None: no row has any.

        Called before every forward pass, dummy runs and graph captures too, on the thread that runs the steps.
        """


def as_factors(record: Buffer, spec: GradientSpec) -> tuple[Buffer, str]:
    """The checked record itself if it has factors, else a record made of it, and the codec. GradientFormatError."""
    codec = verify_record(record, spec).codec
    if is_factors(codec):
        return record, codec
    return encode_gradient(decode_gradient(record, spec), spec, MADE_CODEC), MADE_CODEC
