"""Says what an object store lacks for a bank's gradients. The object that it writes, it removes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextlib import suppress

from bank_service.blobs.objects import ObjectsUnavailableError
from bank_service.blobs.place import PROBE
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.values.engine_state import NO_START, EngineState, Lack
from bank_service.values.objects_url import shown

ENGINE = "object store"
_MEND_CREDENTIALS = "mend them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_REFUSAL = re.compile(r"^403|AccessDenied")
# Faults by the store's status, with the remedy of each. The first that fits.
_FAULTS = (
    (
        re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket"),
        "the bucket",
        "make the bucket, or mend its name in --objects",
    ),
    (
        re.compile(r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken|AuthenticationFailed|^401"),
        "credentials that it takes",
        _MEND_CREDENTIALS,
    ),
    (re.compile(""), "an answer", "mend bucket, endpoint or credentials, which the environment has"),
)
_CONTENT = b"regrad bank --check"
_STAYS = "deleted gradients stay, and purges don't end"


def objects_state(url: str) -> EngineState:
    """Tries each right that a bank needs below its prefix."""
    try:
        return _tried(RemoteObjects.at(url), url)
    except ModuleNotFoundError:
        return EngineState(ENGINE, None, lacks=(Lack("the package obstore", NO_START, "pip install '.[objects]'"),))
    except ObjectsUnavailableError as error:
        got = error.status or "no answer"
        missing, remedy = next((missing, remedy) for fault, missing, remedy in _FAULTS if fault.search(got))
        lack = Lack(missing, NO_START, f"{remedy}; {shown(url)} gave: {got}")
        return EngineState(ENGINE, error.status is not None, lacks=(lack,))


def _tried(objects: RemoteObjects, url: str) -> EngineState:
    name = f"{PROBE}{secrets.token_hex(8)}"
    lacks: list[Lack] = []

    def may(right: str, cost: str, call: Callable[[], object]) -> bool:
        """Whether the store allows a call. ObjectsUnavailableError where it doesn't tell."""
        try:
            call()
        except FileNotFoundError:
            pass
        except ObjectsUnavailableError as error:
            status = error.status or ""
            if not _REFUSAL.search(status) or any(fault.search(status) for fault, *_ in _FAULTS[:-1]):
                raise
            lacks.append(Lack(right, cost, f"allow it below {shown(url)}, which gave: {error.status}"))
            return False
        return True

    # Before anything is written: without this right it would stay.
    may_remove = may("delete objects", _STAYS, lambda: objects.remove(name))
    may("list objects", NO_START, lambda: next(iter(objects.list()), None))
    may("get objects", NO_START, lambda: objects.read(name))
    if len(lacks) == 3:
        lack = Lack("credentials with any right", NO_START, f"{_MEND_CREDENTIALS}; or {lacks[0].remedy}")
        return EngineState(ENGINE, True, url.split("://")[0], (lack,))
    if not may_remove:
        may("put objects", NO_START, lambda: objects.check_put(name))
    elif may("put objects", NO_START, lambda: objects.add(name, _CONTENT)):
        try:
            if objects.add(name, _CONTENT):
                cost = "two new banks could take one prefix"
                lacks.append(Lack("conditional writes (If-None-Match)", cost, "use a store or a version that has them"))
        finally:
            with suppress(FileNotFoundError):
                objects.remove(name)
    return EngineState(ENGINE, True, url.split("://")[0], tuple(lacks))
