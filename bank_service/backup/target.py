"""The target of a snapshot: an absolute folder, or the URL of an object store."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from bank_service.blobs.folder_objects import FolderObjects
from bank_service.blobs.objects import Objects
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import InvalidArgumentError, SnapshotError
from bank_service.values.config import BankConfig
from bank_service.values.objects_url import shown

# Unfinished files lie beside the gradients. The next snapshot removes those that a killed one left.
_UNFINISHED = "blobs/new"
REQUEST_SECONDS = 60.0  # longer than for a gradient, because parts of the catalog are larger


def open_target(target: str) -> Objects:
    """Opens a target as a store of objects. SnapshotError where it can't be opened."""
    target = target.removeprefix("file://")
    if "://" not in target:
        if not target.startswith("/"):
            raise SnapshotError(f"a snapshot must lie in an absolute folder or at a URL, got {shown(target)!r}")
        return FolderObjects(Path(target), _UNFINISHED)
    try:
        return RemoteObjects.at(target, REQUEST_SECONDS)
    except ModuleNotFoundError as error:
        raise SnapshotError(
            "obstore must be installed for snapshots in an object store; pip install '.[objects]'"
        ) from error
    except ValueError as error:
        raise SnapshotError(f"a snapshot must lie in a folder or an object store: {error}") from None


def check_target(config: BankConfig, target: str) -> None:
    """InvalidArgumentError where the bank may not write to that target for a caller."""
    url = target.removeprefix("file://")
    path = PurePosixPath(url.split("://", 1)[-1])
    is_named = path.is_absolute() and len(path.parts) > 1 if "://" not in url else bool(path.parts)
    if not is_named or ".." in path.parts:
        raise InvalidArgumentError(
            f"target must be an absolute folder of the bank's machine or a URL, without .., got {shown(target)!r}",
            field="target",
        )
    root = config.snapshot_root
    if root is None:
        allowed = config.is_loopback
    elif "://" in url:
        allowed = url == root or url.startswith(root.rstrip("/") + "/")
    else:
        allowed = Path(url).resolve().is_relative_to(Path(root.removeprefix("file://")).resolve())
    if not allowed:
        raise InvalidArgumentError(
            f"target must lie below the bank's --snapshot-root, {shown(root or 'which it was started without')}, "
            f"got {shown(target)!r}",
            field="target",
        )
