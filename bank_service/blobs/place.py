"""Where a bank keeps its gradients: in its folder, or in an object store.

The folder names its object store in OBJECTS_FILE, so that no start uses another. The store names its bank in OWNER, see
``claim``. So a bank does not use the store of another bank, whose gradients it would sweep.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from bank_service.blobs.blob_store import BlobStore, objects_in
from bank_service.blobs.claim import OWNER, Claim, Owner
from bank_service.blobs.folder_objects import FolderObjects, write_durably
from bank_service.blobs.objects import Objects
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.blobs.shared_holds import SharedHolds
from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import StoredCollection
from bank_service.catalog.factory import stored_collection
from bank_service.errors import BankError, CollectionMismatchError
from bank_service.values.config import BankConfig

OBJECTS_FILE = "objects.json"
PROBE = "check-"  # objects of `regrad bank --check` begin so
_BLOBS = "blobs"  # the folder's part


def objects_of(data_dir: Path, url: str | None, flag: str = "--objects") -> str | None:
    """The URL of the object store of a bank's folder; None: the folder has the gradients itself.

    ``url`` is the choice for a folder without a bank, by ``flag``. CollectionMismatchError where the bank has made
    another choice.
    """
    try:
        stored: str = json.loads((data_dir / OBJECTS_FILE).read_text())["url"]
    except (FileNotFoundError, NotADirectoryError):
        if url is not None and (data_dir / _BLOBS).exists():
            raise CollectionMismatchError(
                f"{data_dir} must be a new bank's for {flag}, its gradients lie in the folder; `regrad move` "
                "carries the bank to another place"
            ) from None
        return url
    if url is not None and url.rstrip("/") != stored:
        raise CollectionMismatchError(
            f"{flag} must be {stored}, where the gradients of {data_dir} lie, got {url}; leave it out. "
            "`regrad move` carries the bank to another place"
        )
    return stored


def check_objects(data_dir: Path, url: str | None) -> None:
    """Raises the errors of ``open_blobs`` that can be told before the bank is open. Changes nothing."""
    chosen = objects_of(data_dir, url)
    if chosen is not None:
        Owner.read(_opened(chosen))


def check_gradients(config: BankConfig, stored: StoredCollection | None) -> None:
    """CollectionMismatchError where the gradients belong to another catalog than this one, or to a newer state of it,
    or lack. Changes nothing. OSError."""
    data_dir = config.data_dir
    chosen = objects_of(data_dir, config.objects)
    objects = FolderObjects(data_dir / _BLOBS, "tmp") if chosen is None else _opened(chosen)
    place = chosen or str(data_dir / _BLOBS)
    owner = Owner.read(objects)
    _check_owner(owner, place, "" if stored is None else stored.collection_id)
    if stored is not None:
        if stored.has_gradients:
            _check_there(config, chosen, Owner(stored.collection_id), begins=owner is None)
        sequence = stored.sequence
        Claim(objects, place, stored.collection_id, lambda: sequence, lambda: False).check_catalog()
    if chosen is not None and owner is None:
        _check_empty(objects, place)


def open_blobs(config: BankConfig, catalog: Catalog) -> BlobStore:
    """Opens or creates the store of a bank's gradients.

    CollectionMismatchError where they lie elsewhere, where they are newer than the catalog, or where the place has
    gradients of another bank or other objects. OSError where the store doesn't answer or refuses this bank.
    RuntimeError where obstore is missing.
    """
    data_dir, collection_id = config.data_dir, catalog.collection_id
    chosen = objects_of(data_dir, config.objects)
    owned = Owner(collection_id)
    # Before OWNER is read: another node may be the first one now.
    has_gradients = _has_gradients(catalog) or _had_store(config)
    if has_gradients:
        _check_there(config, chosen, owned, begins=False)
    objects: Objects = objects_in(data_dir / _BLOBS) if chosen is None else _opened(chosen)
    place = chosen or str(data_dir / _BLOBS)
    nodes = catalog.nodes
    claim = Claim(
        objects, place, collection_id, partial(_sequence, catalog), partial(_is_writable, catalog),
        None if nodes is None else nodes.objects_name,
    )  # fmt: skip

    def is_new() -> bool:
        owner = Owner.read(objects)
        _check_owner(owner, place, collection_id)
        return owner is None and chosen is not None

    def take(name: str | None = None, is_first: bool = True) -> None:
        if begins and is_new() and chosen is not None:  # a try before this one may have begun the store
            _check_there(config, chosen, owned, begins=not is_first)
            _take(objects, chosen, owned)
        claim.take(name)

    begins = is_new()
    if has_gradients:
        _check_there(config, chosen, owned, begins=begins)
    claim.check_catalog()
    if nodes is None:
        take()
    else:
        nodes.take_objects(take)
        _check_there(config, chosen, owned, begins=is_new())  # the other nodes may have another store
    claim.keep()
    if chosen is not None:
        _note(data_dir, chosen)
    return BlobStore(objects, claim, None if nodes is None else SharedHolds(nodes))


def _check_owner(owner: Owner | None, place: str, collection_id: str) -> None:
    if owner is not None and owner.collection_id != collection_id:
        raise CollectionMismatchError(
            f"{place} must be empty or this bank's own, it belongs to collection {owner.collection_id}; "
            "each bank needs a place of its own"
        )


def _sequence(catalog: Catalog) -> int:
    with catalog.view() as view:
        return view.sequence()


def _is_writable(catalog: Catalog) -> bool:
    try:
        catalog.finish_erasures([]).result()  # changes nothing, but takes a transaction
    except BankError:
        return False
    return True


def _has_gradients(catalog: Catalog) -> bool:
    with catalog.view() as view:
        return bool(view.gradients("", 1))


def _had_store(config: BankConfig) -> bool:
    stored = stored_collection(config.data_dir, config.catalog) if config.catalog is not None else None
    return stored is not None and stored.has_gradients


def _check_there(config: BankConfig, chosen: str | None, owned: Owner, *, begins: bool) -> None:
    """CollectionMismatchError where the place has none of the catalog's gradients: the bank would make all anew.
    ``begins``: nobody has the store ``chosen`` yet."""
    if chosen is None:
        if config.catalog is None or (config.data_dir / _BLOBS).exists():
            return
        place, remedy = str(config.data_dir), f"make the folder {_BLOBS} in it"
    elif begins:
        place, remedy = chosen, f"store {owned.content.decode()} there as {OWNER}"
    else:
        return
    raise CollectionMismatchError(
        f"the catalog's gradients must lie in {place}, which has none; name their folder with --data-dir or their "
        f"store with --objects. If they are lost, {remedy}: the bank then makes them again, but for uploaded ones"
    )


def stored_blobs(data_dir: Path, url: str | None = None, collection_id: str | None = None) -> BlobStore:
    """Opens the store of a bank's gradients for reading, whose bank is stopped. The errors of ``open_blobs``.

    ``url``: of its object store, where the folder may not know it, by --from-objects. ``collection_id``: of the bank
    whose gradients must lie there; None: they may lack.
    """
    chosen = objects_of(data_dir, url, "--from-objects")
    objects = FolderObjects(data_dir / _BLOBS, "tmp") if chosen is None else _opened(chosen)
    if collection_id is not None:
        place = chosen or str(data_dir)
        owner = Owner.read(objects)
        is_there = (data_dir / _BLOBS).exists() if chosen is None else owner is not None
        if not is_there or (owner is not None and owner.collection_id != collection_id):
            found = "those of another bank" if is_there else "none"
            raise CollectionMismatchError(
                f"the catalog's gradients must lie in {place}, which has {found}; "
                "name their folder with --from or their store with --from-objects"
            )
    return BlobStore(objects)


def restored_blobs(data_dir: Path, url: str | None, collection_id: str) -> BlobStore:
    """The store for the gradients of a bank that is being restored or moved into ``data_dir``.

    The object store must be empty, except for the part of the same bank that an interruption left. The errors of
    ``open_blobs``.
    """
    if url is None:
        return BlobStore.in_folder(data_dir / _BLOBS)
    objects = _opened(url)
    wanted = Owner(collection_id, is_restoring=True)
    owner = Owner.read(objects)
    if owner is None:
        _take(objects, url, wanted)
    elif owner != wanted:
        raise CollectionMismatchError(f"{url} must be empty, it belongs to a bank; use another prefix")
    _note(data_dir, url)
    return BlobStore(objects)


def _opened(url: str) -> Objects:
    try:
        return RemoteObjects.at(url)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "obstore must be installed for gradients in an object store; pip install '.[objects]'"
        ) from error


def _check_empty(objects: Objects, url: str) -> None:
    found = next((name for name in objects.list() if not name.startswith(PROBE)), None)
    if found is not None:
        raise CollectionMismatchError(f"{url} must be empty for a new bank, it has {found!r}; use another prefix")


def _take(objects: Objects, url: str, owner: Owner) -> None:
    _check_empty(objects, url)
    objects.add(OWNER, owner.content)
    if Owner.read(objects) != owner:
        raise CollectionMismatchError(f"{url} must belong to one bank, another one has just taken it")


def _note(data_dir: Path, url: str) -> None:
    """Notes the URL in the bank's folder, durably."""
    path = data_dir / OBJECTS_FILE
    if path.exists():
        return
    write_durably(path, json.dumps({"url": url.rstrip("/")}))
