"""One stream of documents to a bank, with a limit on unanswered documents."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import grpc

from bank_service.wire.errors import InternalError, from_rpc_error
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.shown_sequence import ShownSequence
from regrad_vllm.client.messages import receipt_of
from regrad_vllm.client.values import Receipt


class IngestCall:
    """An ingest over blocking gRPC. Both clients use it.

    grpc.aio can't be used, because it loses the bank's status if the bank ends the call during the sending. The
    caller's thread takes the documents, and gRPC's thread sends them. Another thread reads the answers at once, because
    gRPC drops unread answers if the call fails.
    """

    def __init__(
        self, method: Any, in_flight: int, metadata: tuple[tuple[str, str], ...], shown: ShownSequence
    ) -> None:
        """``shown`` learns of each document that is stored, or has no answer at the end.

        ValueError if ``in_flight`` is less than 1.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {in_flight}")
        self._in_flight = in_flight
        self._shown = shown
        # Two counts, because one thread may send while another waits for an answer.
        self._num_sent = 0
        self._num_answered = 0
        self._finished = False
        self._messages: SimpleQueue[Any] = SimpleQueue()  # None ends it
        self._answers: SimpleQueue[pb.IngestDocumentsResponse | Exception | None] = SimpleQueue()
        self._call = method(iter(self._messages.get, None), metadata=metadata)
        threading.Thread(target=self._read, name="ingest-answers", daemon=True).start()

    @property
    def must_receive(self) -> bool:
        """Whether the caller must receive an answer before it sends another document."""
        return not self.has_room or not self._answers.empty()

    @property
    def has_room(self) -> bool:
        """Whether another document may be sent now."""
        return self._num_sent - self._num_answered < self._in_flight

    def send(self, messages: Iterable[Any]) -> None:
        """Sends the messages of one document. It doesn't wait."""
        for message in messages:
            self._messages.put(message)
        self._num_sent += 1

    def finish(self) -> None:
        """Says that no document follows."""
        self._finished = True
        self._messages.put(None)

    def receive(self) -> Receipt | None:
        """The answer to the oldest document that has none. Waits for it. None after the last. BankError.

        ValueError for an answer of another version's bank.
        """
        answer = self._answers.get()
        if isinstance(answer, grpc.RpcError):
            raise from_rpc_error(answer) from answer
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            self._num_answered += 1
            self._shown.advance(answer.sequence)
            return receipt_of(answer)
        if self._num_sent > self._num_answered or not self._finished:
            raise InternalError("the bank must answer every document of a stream, it ended the stream before")
        return None

    def cancel(self) -> None:
        """Ends the call, if it hasn't ended yet, and its threads."""
        if self._num_sent > self._num_answered:
            self._shown.lose()
        self._call.cancel()
        self._messages.put(None)

    def _read(self) -> None:
        end: Exception | None = None
        try:
            for message in self._call:
                self._answers.put(message)
        except Exception as error:  # noqa: BLE001 - any error must reach the caller, who waits for an end
            end = error
        self._answers.put(end)
