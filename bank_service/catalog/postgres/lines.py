"""The sockets of an engine's connections, to end them while other threads wait at them."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from typing import Any

import sqlalchemy as sa


class Lines:
    """Safe to use from many threads. Each socket is a copy of its connection's, so nobody else closes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[Any, socket.socket] = {}  # by the driver's connection

    def follow(self, engine: sa.Engine) -> None:
        """Knows all connections of the engine from now on, also while others still set them up."""
        sa.event.listen(engine, "connect", self._add, insert=True)
        sa.event.listen(engine, "close", self._remove)

    def cut(self) -> None:
        """Ends all connections, so that nobody waits for a server that hangs."""
        with self._lock:
            for line in self._lines.values():
                with suppress(OSError):  # the other end was faster
                    line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends all connections, and forgets them."""
        self.cut()
        with self._lock:
            for line in self._lines.values():
                line.close()
            self._lines.clear()

    def _add(self, connection: Any, _record: object) -> None:
        line = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            for closed in [each for each in self._lines if each.closed]:  # before it was set up
                self._lines.pop(closed).close()
            self._lines[connection] = line

    def _remove(self, connection: Any, _record: object) -> None:
        with self._lock:
            line = self._lines.pop(connection, None)
        if line is not None:
            line.close()
