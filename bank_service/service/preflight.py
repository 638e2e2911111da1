"""Finds in a moment what would keep a bank from starting, before a model is loaded for it.

``BankServer.start`` finds out again when it takes the folder and the ports: anything can happen between the two.
"""

from __future__ import annotations

from bank_service.runtime.data_dir import DataDir
from bank_service.service.tls import server_credentials
from bank_service.service.tokens_file import TokensFile
from bank_service.values.config import BankConfig
from bank_service.wire.ports import check_port


def check_startable(config: BankConfig) -> None:
    """Creates nothing and keeps nothing. BankInUseError where another bank has the folder. RuntimeError where a port is
    taken. OSError, ValueError where the tokens file or a file for TLS can't be used."""
    DataDir(config.data_dir).check_free()
    if config.tokens_file is not None:
        TokensFile(config.tokens_file)
    server_credentials(config)
    for flag, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        if port:
            check_port("the bank", config.host, port, flag)
