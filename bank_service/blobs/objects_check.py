"""Says what an object store lacks for a bank's gradients. The object that it writes, it removes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextlib import suppress

from bank_service.blobs.objects import Objects, ObjectsUnavailableError
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.values.engine_state import NO_START, EngineState, Lack
from bank_service.values.objects_url import shown

ENGINE = "object store"
_REFUSAL = re.compile(r"^40[13]|AccessDenied")
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
        remedy = f"mend bucket, endpoint or credentials, which the environment has; {shown(url)} gave: {got}"
        return EngineState(ENGINE, error.status is not None, lacks=(Lack("an answer", NO_START, remedy),))


def _tried(objects: Objects, url: str) -> EngineState:
    name = f"check-{secrets.token_hex(8)}"
    lacks: list[Lack] = []

    def may(right: str, cost: str, call: Callable[[], object]) -> bool:
        """Whether the store allows a call. ObjectsUnavailableError where it doesn't tell."""
        try:
            call()
        except FileNotFoundError:
            pass
        except ObjectsUnavailableError as error:
            if not _REFUSAL.search(error.status or ""):
                raise
            lacks.append(Lack(right, cost, f"allow it below {shown(url)}, which gave: {error.status}"))
            return False
        return True

    # Before anything is written: without this right it would stay.
    may_remove = may("delete objects", _STAYS, lambda: objects.remove(name))
    may("list objects", NO_START, lambda: next(iter(objects.list()), None))
    may("get objects", NO_START, lambda: objects.read(name))
    if may_remove and may("put objects", NO_START, lambda: objects.add(name, _CONTENT)):
        try:
            if objects.add(name, _CONTENT):
                cost = "two new banks could take one prefix"
                lacks.append(Lack("conditional writes (If-None-Match)", cost, "use a store or a version that has them"))
        finally:
            with suppress(FileNotFoundError):
                objects.remove(name)
    return EngineState(ENGINE, True, url.split("://")[0], tuple(lacks))
