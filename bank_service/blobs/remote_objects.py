"""Objects in S3, Google Cloud Storage or Azure, or in a store that speaks their protocol.

Credentials, region and endpoint come from the environment, such as ``AWS_ACCESS_KEY_ID`` and ``AWS_ENDPOINT_URL``. A
failed request is tried again with jitter, for RETRY_SECONDS. A removal is tried once, because the store may
carry out a first try late, after a new write. So the caller must know of it. S3 compares each upload with its SHA-256.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bank_service.blobs.objects import ObjectsUnavailableError
from bank_service.runtime.seldom import Seldom
from bank_service.values.objects_url import check_objects_url, shown

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0  # of one try
CONNECT_SECONDS = 2.0
RETRY_SECONDS = 10.0  # after it, no further try begins
MAX_RETRIES = 5
RANGE_BYTES = 8 * 2**20  # of a large object in one request
# Errors "not found" that are about the bucket, not about an object in it.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_STATUS = re.compile(r"status code: (\d+ [A-Za-z ]+)")
_CODE = re.compile(r"<Code>(\w+)</Code>|\(code: (\w+)\)")  # the latter in the answer to a removal


class RemoteObjects:
    """Implements ``Objects``. The store writes an object whole and keeps it durable."""

    def __init__(self, store: ObjectStore, remover: ObjectStore, url: str) -> None:
        """``remover`` is the same store, and tries each request once. ``url`` is for the log."""
        self._store = store
        self._remover = remover
        self._failures = Seldom()
        self._url = url

    @classmethod
    def at(cls, url: str, request_seconds: float | None = None) -> RemoteObjects:
        """Opens the store at a URL. It asks the store nothing.

        ``request_seconds``: the longest time of one try; None: REQUEST_SECONDS. ModuleNotFoundError where obstore is
        missing. ValueError for a URL that names no store.
        """
        check_objects_url(url, "an object store")
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        options = {"checksum_algorithm": "SHA256"} if url.startswith("s3://") else {}

        def opened(max_retries: int) -> ObjectStore:
            return from_url(  # type: ignore[call-overload, no-any-return]  # each kind has options of its own
                url,
                # The operator's endpoint says whether there is TLS. Without one it is https.
                client_options={
                    "allow_http": True,
                    "timeout": timedelta(seconds=request_seconds or REQUEST_SECONDS),
                    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                },
                retry_config={
                    "max_retries": max_retries,
                    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=100),
                        "max_backoff": timedelta(seconds=2),
                        "base": 2,
                    },
                },
                **options,
            )

        try:
            store, remover = opened(MAX_RETRIES), opened(0)
        except BaseError as error:
            raise ValueError(f"{shown(url)} must be an object store, got {_reason(error)}") from None
        return cls(store, remover, shown(url))

    def read(self, name: str) -> bytes:
        import obstore

        with self._errors(name):
            return bytes(obstore.get(self._store, name).bytes())

    def put(self, name: str, content: bytes) -> None:
        import obstore

        with self._errors(name):
            obstore.put(self._store, name, content)

    def add(self, name: str, content: bytes) -> bool:
        """The store decides, so this holds for all processes."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._errors(name):
            try:
                obstore.put(self._store, name, content, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def check_put(self, name: str) -> None:
        """Asks for a write that can't be: of a new version of an object that isn't there. So it needs the right to
        write, and writes nothing."""
        import obstore
        from obstore.exceptions import PreconditionError

        with self._errors(name), suppress(PreconditionError):
            obstore.put(self._store, name, b"", mode={"e_tag": '"0"', "version": "1"})

    def list(self) -> Iterator[str]:
        for name, _ in self.sizes():
            yield name

    def remove(self, name: str) -> None:
        import obstore

        with self._errors(name):
            obstore.delete(self._remover, name)

    def sizes(self) -> Iterator[tuple[str, int]]:
        import obstore

        with self._errors(""):
            for page in obstore.list(self._store):
                for found in page:
                    yield found["path"], found["size"]

    def size(self, name: str) -> int:
        import obstore

        with self._errors(name):
            return obstore.head(self._store, name)["size"]

    def put_file(self, name: str, path: Path) -> None:
        import obstore

        with self._errors(name):
            obstore.put(self._store, name, path)

    def get_file(self, name: str, path: Path) -> None:
        import obstore

        size = self.size(name)
        with self._errors(name), path.open("wb") as file:
            for start in range(0, size, RANGE_BYTES):
                end = min(start + RANGE_BYTES, size)
                file.write(obstore.get_range(self._store, name, start=start, end=end))

    def sync(self, names: Iterable[str]) -> None:
        """Does nothing: an object is durable once its store has accepted it."""

    def path(self, name: str) -> Path | None:
        return None

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """FileNotFoundError where the object is missing, ObjectsUnavailableError for all other errors of the store."""
        from obstore.exceptions import BaseError, NotFoundError

        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            if _NO_BUCKET.search(str(error)):
                raise self._failure(error) from None
            raise FileNotFoundError(f"{self._url} must have {name}, it has not") from None
        except BaseError as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> ObjectsUnavailableError:
        """Every reader of the bank may see its message, so only the log has the URL."""
        if self._failures.is_due():
            logger.warning("the object store %s must answer, got %s", self._url, _reason(error))
        status = _status(error)
        failure = ObjectsUnavailableError(
            f"the object store must answer, got {status or 'none'}; if that lasts, look at its bucket, its endpoint "
            "and the credentials"
        )
        failure.status = status
        return failure


def _status(error: Exception) -> str | None:
    """The status of the store's answer, with its code. None where there was no answer."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    name = "" if code is None else code[1] or code[2]
    if status is None:
        return name or None
    return status[1].strip() + (f" ({name})" if name else "")


def _reason(error: Exception) -> str:
    """A line for a message. The error's text has a page of the store's answer, and debug output."""
    return _status(error) or str(error).split("\n", 1)[0].rsplit(" - ", 1)[-1].strip()[:200]
