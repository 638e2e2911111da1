"""Encodes a corpus on Ray Data: one task reads it, actors encode it, and the driver gets their results.

The reader runs on the driver's machine, where the files are. Ray Data holds it back while the actors are busy. The
actors send gradients straight to the bank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

from regrad_vllm.client.corpus import BadInput, CorpusDocument, CorpusFile, read_corpus
from regrad_vllm.data.token_counts import tokenizer_of
from regrad_vllm.distributed.encoding_worker import EncodingJob, EncodingWorker, Result, line_of

LOCAL = "local"  # Ray's name for a Ray of this process, which ends with it
_BATCH_SIZE = 32  # documents
_BLOCK_BYTES = 64 * 2**10  # of documents between reader and actors; large ones would all go to one actor
_OBJECT_STORE_BYTES = 256 * 2**20  # of a local Ray; Ray's own default is 30% of the memory


class EncodingError(RuntimeError):
    """An encoding that ended early. All documents that the bank has acknowledged are stored."""


def encode_on_ray(
    job: EncodingJob, files: Sequence[CorpusFile], known: Sequence[BadInput], *, address: str, num_workers: int | None
) -> Iterator[Result]:
    """The results of all documents of the files, in any order, while you iterate. It ends a Ray that it has started.

    known: input that is left out. address: of a running cluster, or LOCAL. num_workers: None: one for each GPU, or for
    each core of a cluster without GPUs. EncodingError, also where Ray doesn't start or there is none at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.data.exceptions import UserCodeException
    from ray.exceptions import RayError

    _connect(address)
    try:
        _quieten()
        resources = ray.cluster_resources()
        num_gpus = int(resources.get("GPU", 0))
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        read = partial(_read, files, {item.place for item in known}, job.model, Path.cwd())
        documents = ray.data.from_items([0]).map_batches(read, batch_size=1, num_cpus=0, label_selector=here)
        results = documents.map_batches(
            EncodingWorker,
            fn_constructor_args=(job,),
            batch_size=_BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=num_workers or num_gpus or int(resources["CPU"])),
            **({"num_gpus": 1} if num_gpus else {"num_cpus": 1}),
        )
        for row in results.iter_rows():
            yield Result(**row)
    except (RayError, UserCodeException) as error:
        raise EncodingError(
            f"{_reason(error)}; the stored documents stay, so run the command again to go on"
        ) from error
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """EncodingError where Ray doesn't start, or where there is none."""
    import ray

    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address, logging_level=logging.WARNING, log_to_driver=False, **own)
    except Exception as error:  # noqa: BLE001  # Ray raises a plain one where it doesn't start in time
        remedy = "try again when the machine is less busy" if own else "start Ray there, or name its address with --ray"
        raise EncodingError(
            f"Ray must be there to encode on ({address}), got: {_reason(error).rstrip('.')}; {remedy}, or let the bank "
            "encode with `regrad ingest`"
        ) from error


def _quieten() -> None:
    """The command has a progress bar of its own, and an error reaches its user as one line."""
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _read(
    files: Sequence[CorpusFile], known: set[str], model: Path, folder: Path, _: object
) -> Iterator[dict[str, list[str]]]:
    """The documents as lines, one at a time. RuntimeError for unusable input that was usable when it was checked.

    folder: the current one of the command, because the files may be named from there.
    """
    with chdir(folder):
        for item in read_corpus(files, tokenizer_of(model)):
            if isinstance(item, CorpusDocument):
                yield {"document": [line_of(item)]}
            elif item.place not in known:
                raise RuntimeError(f"{item}; it was usable when the corpus was checked")


def _reason(error: BaseException) -> str:
    """The first cause of an error that Ray has wrapped. Ray adds lines about its own settings to the message."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
