"""An object store in bad weather."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bank_service.backup.target import open_target
from bank_service.blobs import remote_objects
from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.objects import Objects, ObjectsUnavailableError
from bank_service.blobs.place import check_objects
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import SnapshotError, UnavailableError
from bank_service.wire.record import record_digest
from benchmarks.servers.object_servers import ObjectServer
from tests.bank.weather import Weather


@pytest.fixture
def objects(weather: Weather, objects_url: str) -> RemoteObjects:
    return RemoteObjects.at(objects_url, 4.0)


def test_a_store_that_is_busy_is_asked_again_after_pauses_that_grow(objects: RemoteObjects, weather: Weather) -> None:
    weather.num_refused = 2
    begun = time.monotonic()
    assert objects.add("ab/cd", b"one")
    weather.num_refused = 2
    assert objects.read("ab/cd") == b"one"
    assert time.monotonic() - begun > 0.3, "each first pause takes 0.1 s at least"
    assert [method for method, _ in weather.requests] == ["PUT"] * 3 + ["GET"] * 3


def test_a_store_that_stays_busy_is_given_up(
    weather: Weather, objects_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "MAX_RETRIES", 1)
    objects = RemoteObjects.at(objects_url)
    weather.num_refused = 100
    with pytest.raises(ObjectsUnavailableError, match=r"503 Service Unavailable \(SlowDown\)"):
        objects.read("ab/cd")
    assert len(weather.requests) == 2


ASKS: dict[str, Callable[[Objects], object]] = {
    "read": lambda objects: objects.read("ab/cd"),
    "put": lambda objects: objects.put("ab/cd", b"one"),
    "list": lambda objects: list(objects.list()),
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_store_that_is_slow_is_given_up(
    weather: Weather, objects_url: str, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "RETRY_SECONDS", 1.0)
    objects = RemoteObjects.at(objects_url, 0.5)
    weather.delay_seconds = 20.0
    begun = time.monotonic()
    with pytest.raises(ObjectsUnavailableError, match="must answer"):
        ASKS[ask](objects)
    assert time.monotonic() - begun < 15  # the store answers after 20


def test_a_store_that_hung_is_read_again_when_it_goes_on(
    object_server: ObjectServer, objects_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "MAX_RETRIES", 0)
    objects = RemoteObjects.at(objects_url, 4.0)
    objects.put("ab/cd", b"one")
    os.kill(object_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ObjectsUnavailableError):
            objects.put("ab/ef", b"two")
    finally:
        os.kill(object_server.pid, signal.SIGCONT)
    assert objects.read("ab/cd") == b"one"


def test_a_missing_bucket_is_no_missing_object(objects_url: str) -> None:
    objects = RemoteObjects.at(objects_url.replace("//bucket", "//none"))
    for ask in (lambda: objects.read("ab/cd"), lambda: objects.add("ab/cd", b"one"), lambda: list(objects.list())):
        with pytest.raises(ObjectsUnavailableError, match="NoSuchBucket"):
            ask()
    with pytest.raises(UnavailableError, match="can't be read now"):
        BlobStore(objects).get("0" * 64)


def test_every_upload_has_a_checksum_that_the_store_compares(objects: RemoteObjects, weather: Weather) -> None:
    objects.put("ab/cd", b"one")
    objects.add("ab/ef", b"two")
    expected = [base64.b64encode(hashlib.sha256(content).digest()).decode() for content in (b"one", b"two")]
    assert [checksum for _, checksum in weather.requests] == expected


def test_a_new_record_takes_one_request_and_one_that_is_there_is_verified(
    objects: RemoteObjects, weather: Weather
) -> None:
    blobs, digest = BlobStore(objects), record_digest(b"one")
    with blobs.hold(digest):
        blobs.put(digest, b"one")
        assert [method for method, _ in weather.requests] == ["PUT"]
        blobs.put(digest, b"one")
        assert [method for method, _ in weather.requests] == ["PUT", "PUT", "GET"]
        objects.put(f"{digest[:2]}/{digest[2:]}", b"rot")
        blobs.put(digest, b"one")
    assert blobs.get(digest) == b"one"


def test_a_record_is_not_stored_while_its_removal_may_still_happen(objects: RemoteObjects, weather: Weather) -> None:
    """The store gets the removal in time, and answers too late."""
    blobs, one, two = BlobStore(objects), record_digest(b"one"), record_digest(b"two")
    for digest, record in ((one, b"one"), (two, b"two")):
        with blobs.hold(digest):
            blobs.put(digest, record)
    weather.delay_seconds = 8.0
    sweep = blobs.sweep(lambda digests: set(), [one, two])
    assert sweep.failed.keys() == {one, two} and sweep.num_removed == 0
    weather.delay_seconds = 0.0
    records = {one: b"one", two: b"two"}
    refused = []
    for digest in (one, two):
        with blobs.hold(digest):
            try:
                blobs.put(digest, records[digest])
            except UnavailableError as error:
                assert "must be over" in str(error)
                refused.append(digest)
    assert len(refused) == 1, "the other was not asked for"


def test_a_removal_is_asked_for_once_and_leaves_a_doubt_where_it_was_refused(
    objects: RemoteObjects, weather: Weather
) -> None:
    """A gateway may answer an error and still carry the removal out."""
    blobs, digest = BlobStore(objects), record_digest(b"one")
    with blobs.hold(digest):
        blobs.put(digest, b"one")
    weather.requests.clear()
    weather.num_refused = 1
    assert blobs.sweep(lambda digests: set(), [digest]).failed.keys() == {digest}
    assert len(weather.requests) == 1
    with blobs.hold(digest), pytest.raises(UnavailableError, match="must be over"):
        blobs.put(digest, b"one")
    assert blobs.sweep(lambda digests: set(), [digest]).num_removed == 1


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/a/prefix", "az://container/prefix/"])
def test_each_kind_of_store_is_opened_without_asking_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert RemoteObjects.at(url).path("ab/cd") is None
    if url.startswith("az://"):
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
        with pytest.raises(ValueError, match="Account must be specified"):
            RemoteObjects.at(url)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "s3://", "s3://key:s3cret@bucket/x", "s3://bucket/x?key=s3cret", "s3://bucket/../x", "s3:bucket"],
)
def test_a_url_that_names_no_store_or_has_credentials_is_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ValueError, match="an object store must be like") as caught:
        RemoteObjects.at(url)
    assert "key:s3cret" not in str(caught.value)


def test_without_obstore_the_message_says_what_to_install(
    objects_url: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("obstore", "obstore.exceptions", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    remedy = r"pip install '\.\[objects\]'"
    with pytest.raises(RuntimeError, match=remedy):
        check_objects(data_dir, objects_url)
    with pytest.raises(SnapshotError, match=remedy):
        open_target(objects_url)
