"""Joins the chunks in which the bank sends gradient records."""

from __future__ import annotations

from collections.abc import Sequence

from bank_service.wire.errors import DataLossError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import GradientSpec, max_record_bytes


class RecordStream:
    """Joins the chunks of one FetchGradients call and checks them against the requested digests."""

    def __init__(self, digests: Sequence[str], spec: GradientSpec) -> None:
        self._expected = iter(digests)
        self._max_bytes = max_record_bytes(spec)
        self._buffer = bytearray()

    def add(self, message: pb.FetchGradientsResponse) -> bytes | None:
        """The record that ``message`` completes, or None. DataLossError for an unexpected chunk."""
        if message.record_bytes > self._max_bytes:
            raise _broken(message.digest, f"claims {message.record_bytes} bytes, more than any of this learner")
        if message.offset != len(self._buffer):
            raise _broken(message.digest, f"has a hole: chunk at {message.offset}, {len(self._buffer)} bytes read")
        self._buffer += message.chunk
        if len(self._buffer) < message.record_bytes:
            return None
        if message.digest != next(self._expected, None):
            raise _broken(message.digest, "was not the one asked for")
        record = bytes(self._buffer)
        self._buffer.clear()
        return record

    def end(self) -> None:
        """Call it at the end of the stream. DataLossError if a record is missing."""
        missing = next(self._expected, None)
        if missing is not None:
            raise _broken(missing, "did not arrive")


def _broken(digest: str, what: str) -> DataLossError:
    return DataLossError(f"the bank's stream of gradient {digest} {what}; is it a bank of this version?", digest=digest)
