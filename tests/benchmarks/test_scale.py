"""The simulation of many servers and bank nodes: nothing is lost in it, and simple cases are as computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scale_simulation
from benchmarks.popularity import Popularity
from benchmarks.scale_model import LEVELS, ROUTERS, DrawnTrace, Machines, Ring, Router, ServiceTimes, Simulation

SMALL = {"documents": 5000, "namespaces": 50, "pool": 100, "arena": 400, "redis": 1500}
ALL = 10**9  # more than there are
INSTANT = dict.fromkeys(
    ("sql", "node_gradient", "redis_gradient", "store_gradient", "resident", "resident_document", "answer"), 0.0
)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_answered_and_every_reference_is_found_at_one_level(router: Router) -> None:
    machines, times = Machines(**SMALL), ServiceTimes()
    outcome = Simulation(machines, times, router, seed=1).run(rate=900, num_requests=2000, num_before=500)
    assert outcome.num_started == outcome.num_answered == len(outcome.resident_ms) == 2000
    trace = DrawnTrace.draw(machines, 2500, seed=1)
    assert sum(outcome.levels.values()) == sum(map(len, trace.documents[500:]))
    assert set(outcome.levels) == set(LEVELS) and min(outcome.levels.values()) > 0
    missing = outcome.levels["redis"] + outcome.levels["store"]
    busy = {kind: sum(ms for (one, _), ms in outcome.busy_ms.items() if one == kind) for kind in outcome.utilisation()}
    assert busy == {
        "bank nodes": pytest.approx(2000 * (times.embed + times.node) + missing * times.node_gradient),
        "PostgreSQL": pytest.approx(2000 * times.sql),
        "Redis": pytest.approx(missing * times.redis_gradient),
        "servers' batches": pytest.approx(2000 * times.answer),
    }
    least = times.embed + times.node + times.sql + times.resident  # of one that found all in the pool and no queue
    assert min(outcome.resident_ms) == pytest.approx(least)
    assert outcome.full_at()["PostgreSQL"] == pytest.approx(1000 * machines.postgres_cores / times.sql)


def test_the_trace_keeps_the_law_and_the_documents_of_a_request_share_a_namespace() -> None:
    machines = Machines(**SMALL)
    trace = DrawnTrace.draw(machines, 40_000, seed=2)
    first, others = [one[0] for one in trace.documents], [each for one in trace.documents for each in one[1:]]
    shares = [sum(document < machines.documents / 5 for document in part) / len(part) for part in (first, others)]
    assert shares[0] == pytest.approx(0.74, abs=0.01)
    assert 0.6 < shares[1] < 0.74, "less, because the popular ones are drawn twice and count once"
    namespace_of: dict[int, int] = {}
    for namespace, documents in zip(trace.namespaces, trace.documents, strict=True):
        assert all(namespace_of.setdefault(document, namespace) == namespace for document in documents)
    assert len(set(namespace_of.values())) == machines.namespaces


def test_one_server_with_room_for_all_misses_each_document_once() -> None:
    machines = Machines(**SMALL | {"servers": 1, "pool": ALL, "arena": ALL, "redis": ALL, "top_k": 1, "slots": ALL})
    outcome = Simulation(machines, ServiceTimes(), "round robin", seed=3).run(rate=5, num_requests=8000)
    different = len({document for (document,) in DrawnTrace.draw(machines, 8000, seed=3).documents})
    assert outcome.levels == {"store": different, "pool": 8000 - different}
    assert different == pytest.approx(Popularity.zipf(machines.documents).distinct(8000), rel=0.02)


def test_one_server_with_little_room_has_the_hits_that_are_computed() -> None:
    machines = Machines(**SMALL | {"servers": 1, "arena": 800, "pool": 200, "redis": ALL, "top_k": 1})
    outcome = Simulation(machines, ServiceTimes(), "round robin", seed=4).run(5, num_requests=20_000, num_before=20_000)
    popularity = Popularity.zipf(machines.documents)
    assert outcome.levels["pool"] / 20_000 == pytest.approx(popularity.hit_ratio(200), abs=0.015)
    found = outcome.levels["pool"] + outcome.levels["arena"]
    assert found / 20_000 == pytest.approx(popularity.hit_ratio(800), abs=0.015)


def test_the_wait_for_one_busy_node_is_that_of_the_formula() -> None:
    """M/D/1: a mean wait of ρ s / (2 (1 − ρ)) for the service time s."""
    machines = Machines(nodes=1, node_cores=1, permits=ALL, servers=1, documents=50, namespaces=5)  # all in the pool
    times = ServiceTimes(**INSTANT, embed=4.0, node=6.0)
    outcome = Simulation(machines, times, "round robin", seed=5).run(rate=60, num_requests=40_000, num_before=2000)
    assert set(outcome.levels) == {"pool"}
    wait = sum(outcome.resident_ms) / 40_000 - 10
    assert wait == pytest.approx(0.6 * 10 / (2 * 0.4), rel=0.06)
    assert outcome.utilisation()["bank nodes"] == pytest.approx(0.6, rel=0.03)


def test_without_one_server_only_its_keys_move() -> None:
    eight, seven = Ring(8), Ring(7)
    before = [eight.server_of(key) for key in range(4000)]
    assert all(seven.server_of(key) == server for key, server in enumerate(before) if server < 7)
    assert min(before.count(server) for server in range(8)) > 4000 / 8 * 0.7


def test_a_run_ends_with_a_table_a_plot_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--rates 100 200 --requests 300 --before 200 --documents 2000 --namespaces 20 --store-gradient-ms 20"
    assert scale_simulation.main([*flags.split(), "--seed", "7", "--out", str(tmp_path / "plot.svg")]) == 0
    *rows, line = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert len(rows) == 2 + 2 * len(ROUTERS) == 2 + len(figures["runs"])
    assert figures["times_ms"]["store_gradient"] == 20 and figures["machines"]["documents"] == 2000
    for run in figures["runs"]:
        assert sum(run["hits"].values()) == pytest.approx(1, abs=1e-3)
        assert run["resident_ms_p50"] <= run["resident_ms_p99"] and run["first"] in run["busy"]
    assert (tmp_path / "plot.svg").read_text("utf-8").startswith("<?xml")
