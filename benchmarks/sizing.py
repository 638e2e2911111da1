"""From unit costs to machines: ``python -m benchmarks.sizing``. It computes and measures nothing.

Each flag is a unit cost or a wish. Its default was measured on two cores; docs/sizing.md names the command of each.
Put in your own. The tables are Markdown, and the last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import HEADER_BYTES, codec_named
from benchmarks.popularity import Popularity
from regrad_vllm.arguments import whole
from regrad_vllm.default_model import shipped_learner
from regrad_vllm.flags import add_flags, given
from regrad_vllm.learner import Learner

DOCUMENTS = (10**6, 21 * 10**6, 10**9)  # 21 million: the passages of Wikipedia in many papers
CODECS = ("factors-4-1-8", "factors-4-1-4")
REDIS_KEY_BYTES = 1_258  # of a cached gradient beside its value, measured with jemalloc


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCosts:
    """The costs of one document and of one request, and the wishes for a service."""

    codec: str = "factors-4-1-8"  # of the gradients that are served
    learner: Path | None = None  # folder of yours, which says how large gradients are; None: the one that ships
    postgres_bytes: int = 11_875  # of a document in PostgreSQL
    postgres_hot_bytes: int = 2_386  # of these: vectors, graph and the indexes of documents, which searches read
    graph_s: float = 34.0  # to build the graph of 100,000 vectors
    encode_per_s: float = 4.1  # documents of 128 tokens that two cores encode in a second
    embed_per_s: float = 18.0  # documents of six sentences that two cores embed and store in a second
    node_core_ms: float = 12.2  # of a core for a query in a bank node and its client, without the embedder
    embed_core_ms: float = 10.8  # of a core for the embedding of a query
    sql_core_ms: float = 4.7  # of a core for a query in PostgreSQL
    top_k: int = 3  # documents of a request
    requests_per_s: float = 1000.0  # at all servers together
    servers: int = 8  # vLLM servers
    arena_gib: float = 16.0  # of each server
    redis_gib: float = 64.0  # of all Redis servers together
    top_fifth_share: float = 0.74  # of the references, to the most popular fifth of the documents

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            may_be_0 = name in ("arena_gib", "redis_gib")
            if isinstance(value, int | float) and not (0 < value < 1e18 or (may_be_0 and value == 0)):
                raise ValueError(f"{name} must be more than 0 and less than 1e18, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=whole(5), nargs="+", default=list(DOCUMENTS))
    add_flags(parser, UnitCosts)
    args = parser.parse_args(argv)
    try:
        costs = UnitCosts(**given(args, UnitCosts))
        sizes = [sized(number, costs) for number in args.documents]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{stored_table(sizes)}\n{served_table(sizes)}\n")
    sys.stdout.write(json.dumps({"costs": asdict(costs), "sizes": sizes}, default=str) + "\n")
    return 0


def record_bytes(codec: str, learner: Path | None = None) -> int:
    """Of a gradient of a learner. None: the one that ships."""
    return HEADER_BYTES + codec_named(codec).max_payload_bytes(Learner.load(learner or shipped_learner()).spec)


def redis_bytes(record: int) -> int:
    """Of a cached gradient in a server with jemalloc, which has four sizes between two powers of two."""
    step = 2 ** (int(math.log2(record)) - 2)
    return -(-record // step) * step + REDIS_KEY_BYTES


def sized(num_documents: int, costs: UnitCosts) -> dict[str, float]:
    """All figures of a bank of so many documents. ValueError for fewer than five, or an unknown codec."""
    popularity = Popularity.zipf(num_documents, costs.top_fifth_share)
    references = costs.requests_per_s * costs.top_k
    answer = pb.QueryResponse(
        hits=[pb.QueryResponse.Hit(id="d" * 20, gradient_digest="0" * 64, score=1, cosine=1)] * costs.top_k
    )
    figures: dict[str, float] = {
        "documents": num_documents,
        "postgres_bytes": num_documents * costs.postgres_bytes,
        "postgres_hot_bytes": num_documents * costs.postgres_hot_bytes,
        "graph_hours": num_documents / 100_000 * costs.graph_s / 3600,
        "encode_two_core_hours": num_documents * (1 / costs.encode_per_s + 1 / costs.embed_per_s) / 3600,
        "object_puts": num_documents,
        "node_cores": costs.requests_per_s * (costs.node_core_ms + costs.embed_core_ms) / 1000,
        "postgres_cores": costs.requests_per_s * costs.sql_core_ms / 1000,
        "answers_bytes_per_s": costs.requests_per_s * answer.ByteSize(),
    }
    record = record_bytes(costs.codec, costs.learner)
    of_one = costs.arena_gib * 2**30 / record
    for way, num_cached in (("round_robin", of_one), ("hashed", costs.servers * of_one)):
        arena = popularity.hit_ratio(num_cached)
        redis = max(arena, popularity.hit_ratio(costs.redis_gib * 2**30 / redis_bytes(record)))
        figures |= {
            f"{way}_arena_hits": arena,
            f"{way}_gradient_bytes_per_s": references * (1 - arena) * record,
            f"{way}_object_gets_per_s": references * (1 - redis),
        }
    for codec in CODECS:
        record = record_bytes(codec, costs.learner)
        figures |= {
            f"{codec}_bytes": num_documents * record,
            f"{codec}_redis_fifth_bytes": num_documents // 5 * redis_bytes(record),
        }
    return figures


def stored_table(sizes: Sequence[dict[str, float]]) -> str:
    """The sizes of all that is stored, and the time to fill it."""
    rows = {f"gradients, {codec}": _shown(sizes, f"{codec}_bytes", "B") for codec in CODECS}
    rows |= {
        "PostgreSQL, all": _shown(sizes, "postgres_bytes", "B"),
        "PostgreSQL, memory for searches": _shown(sizes, "postgres_hot_bytes", "B"),
        "PostgreSQL, hours for one graph": _shown(sizes, "graph_hours"),
    }
    rows |= {
        f"Redis for a fifth of them, {codec}": _shown(sizes, f"{codec}_redis_fifth_bytes", "B") for codec in CODECS
    }
    rows |= {
        "objects written": _shown(sizes, "object_puts"),
        "hours to encode and embed on two cores": _shown(sizes, "encode_two_core_hours"),
    }
    return _table(sizes, rows)


def served_table(sizes: Sequence[dict[str, float]]) -> str:
    """The costs of the wished requests a second."""
    rows = {
        "cores of bank nodes": _shown(sizes, "node_cores"),
        "cores of PostgreSQL": _shown(sizes, "postgres_cores"),
        "answers to queries, a second": _shown(sizes, "answers_bytes_per_s", "B"),
    }
    for way, name in (("round_robin", "every server has all"), ("hashed", "each document at one server")):
        rows |= {
            f"{name}: found in arenas": [f"{size[f'{way}_arena_hits']:.0%}" for size in sizes],
            f"{name}: gradients to servers, a second": _shown(sizes, f"{way}_gradient_bytes_per_s", "B"),
            f"{name}: objects read, a second": _shown(sizes, f"{way}_object_gets_per_s"),
        }
    return _table(sizes, rows)


def _shown(sizes: Sequence[dict[str, float]], key: str, unit: str = "") -> list[str]:
    return [quantity(size[key], unit) for size in sizes]


def quantity(value: float, unit: str = "") -> str:
    """Two or three digits and the power of 1,000."""
    scale = max(0, min(5, int(math.log10(max(value, 1)) // 3)))
    shown = value / 1000**scale
    digits = 0 if shown >= 99.5 else 1 if shown >= 9.95 else 2
    text = f"{shown:.{digits}f}"
    if unit:
        return f"{text} {('', 'k', 'M', 'G', 'T', 'P')[scale]}{unit}"
    return text + ("", " thousand", " million", " billion", " trillion", " quadrillion")[scale]


def _table(sizes: Sequence[dict[str, float]], rows: dict[str, list[str]]) -> str:
    head = ["", *(f"{int(size['documents']):,} documents" for size in sizes)]
    lines = [head, ["---", *["--:"] * len(sizes)], *([name, *cells] for name, cells in rows.items())]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
