"""The times of the preparation, with a slow bank on the wire and no engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.plan import Plan, Planner
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.preparer import Preparer
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.routes import SHAPES
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.settings import Settings
from tests.serve.support import BankThread

QUERY_MS = 200
ASKED = {"model": "base-regrad", "prompt": "x", "regrad": {"document_ids": ["doc-1", "doc-2", "doc-3"]}}


class SlowBank(bank_pb2_grpc.BankServiceServicer):
    """Finds nothing, slowly."""

    async def Query(self, request: bank_pb2.QueryRequest, context: Any) -> bank_pb2.QueryResponse:  # noqa: N802
        await asyncio.sleep(QUERY_MS / 1000)
        return bank_pb2.QueryResponse()


class BreakingBank(bank_pb2_grpc.BankServiceServicer):
    """Passes calls on to a bank. Each of its first streams of gradients breaks after one record."""

    def __init__(self, bank: bank_pb2_grpc.BankServiceStub, num_broken: int) -> None:
        self._bank, self._num_broken = bank, num_broken
        self.asked: list[int] = []  # digests of each call

    async def Query(self, request: bank_pb2.QueryRequest, context: Any) -> Any:  # noqa: N802
        return await self._bank.Query(request)

    async def FetchGradients(self, request: bank_pb2.FetchGradientsRequest, context: Any) -> Any:  # noqa: N802
        self.asked.append(len(request.digests))
        async for message in self._bank.FetchGradients(request):
            if len(self.asked) <= self._num_broken and message.digest != request.digests[0]:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            yield message


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("scheme", "num_broken", "asked"), [("ipv4:{0},{0}", 1, [3, 2]), ("ipv4:{0},{0}", 2, [3, 2]), ("{0}", 1, [3])]
)
async def test_of_several_nodes_another_one_is_asked_once_for_the_rest_of_a_broken_stream(
    learner: Learner, bank: BankThread, tmp_path: Path, scheme: str, num_broken: int, asked: list[int]
) -> None:
    server = grpc.aio.server()
    async with grpc.aio.insecure_channel(bank.address) as channel:
        breaking = BreakingBank(bank_pb2_grpc.BankServiceStub(channel), num_broken)
        bank_pb2_grpc.add_BankServiceServicer_to_server(breaking, server)
        address = scheme.format(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        arena = Arena.open(tmp_path / "arena", 2**26)
        plan = Planner(Settings(learner=tmp_path, bank=address), learner, ("base",)).plan(
            ASKED, SHAPES["/v1/completions"], None, frozenset()
        )
        assert isinstance(plan, Plan)
        async with AsyncBank(address, spec=learner.spec, timeout_ms=5000) as client:
            preparer = Preparer(learner, client, arena, Engine(None, []), Metrics.create(CollectorRegistry()), 1)
            if len(asked) > num_broken:
                (await preparer._find_held(plan)).gradients.release()
                assert arena.figures().num_records == 3
            else:
                with pytest.raises(RequestError, match="can't be reached"):
                    await preparer._find_held(plan)
        assert breaking.asked == asked and arena.figures().num_holds == 0
        await server.stop(None)
        arena.close()


@pytest.mark.asyncio
async def test_the_time_of_a_query_contains_the_wait_for_its_turn_and_failures(
    learner: Learner, tmp_path: Path
) -> None:
    server = grpc.aio.server()
    bank_pb2_grpc.add_BankServiceServicer_to_server(SlowBank(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    registry = CollectorRegistry()
    arena = Arena.open(tmp_path / "arena", 2**20)
    planner = Planner(Settings(learner=tmp_path, bank=address), learner, ("base",))
    plan = planner.plan({"model": "base-regrad", "prompt": "x"}, SHAPES["/v1/completions"], None, frozenset())
    assert isinstance(plan, Plan)
    async with AsyncBank(address, spec=learner.spec, timeout_ms=5000, attempts=1) as bank:
        preparer = Preparer(learner, bank, arena, Engine(None, []), Metrics.create(registry), 1)
        prepared = await asyncio.gather(preparer.prepare(plan), preparer.prepare(plan))
        first, second = sorted(one.used.timings_ms["retrieve"] for one in prepared)
        assert first >= 0.9 * QUERY_MS and second >= first + 0.9 * QUERY_MS
        await server.stop(None)
        with pytest.raises(RequestError):
            await preparer.prepare(plan)
    assert registry.get_sample_value("regrad_retrieve_ms_count") == 3
    arena.close()
