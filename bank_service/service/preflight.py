"""Checks quickly whether a bank could start, before its model is loaded.

``BankServer.start`` checks again when it takes the folder and the ports, because either may be taken meanwhile.
"""

from __future__ import annotations

from bank_service.blobs.place import check_objects, objects_of
from bank_service.catalog.factory import check_place
from bank_service.runtime.data_dir import DataDir
from bank_service.service.own_redis import own_redis_url
from bank_service.service.tls import server_credentials
from bank_service.service.tokens_file import TokensFile
from bank_service.values.config import BankConfig
from bank_service.wire.ports import check_port


def check_startable(config: BankConfig) -> None:
    """Raises the error that would stop the bank's start. It creates and keeps nothing.

    BankInUseError if another bank has the folder or the catalog. CollectionMismatchError if the folder's catalog or
    gradients lie elsewhere. RuntimeError if a port is taken or the catalog's server or replica can't be used. OSError
    or ValueError if the tokens file, the file of Redis' URL, a file for TLS or the object store can't be used.
    """
    DataDir(config.data_dir).check_free()
    is_shared = objects_of(config.data_dir, config.objects) is not None
    check_place(config.data_dir, config.catalog, is_shared=is_shared, replica_url=config.catalog_read)
    if config.tokens_file is not None:
        TokensFile(config.tokens_file)
    server_credentials(config)
    own_redis_url(config)
    check_objects(config.data_dir, config.objects)
    for flag, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        if port:
            check_port("the bank", config.host, port, flag)
