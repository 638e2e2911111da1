"""A bank as it was before there were cues: the messages lack their fields. A real bank answers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc


class _WithoutCues(bank_pb2_grpc.BankServiceServicer):
    def __init__(self, bank: bank_pb2_grpc.BankServiceStub) -> None:
        self._bank = bank

    def Query(self, request: pb.QueryRequest, context: grpc.ServicerContext) -> pb.QueryResponse:
        request.ClearField("with_cue")
        request.ClearField("cue_text")
        return self._bank.Query(request)

    def FetchGradients(
        self, request: pb.FetchGradientsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchGradientsResponse]:
        try:
            yield from self._bank.FetchGradients(request)
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata())
            context.abort(error.code(), error.details())


@contextmanager
def without_cues(target: str) -> Iterator[str]:
    """The address of a bank that doesn't know cues. ``target`` is host:port of the one behind it."""
    server = grpc.server(ThreadPoolExecutor(4))
    with grpc.insecure_channel(target) as channel:
        bank_pb2_grpc.add_BankServiceServicer_to_server(_WithoutCues(bank_pb2_grpc.BankServiceStub(channel)), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
