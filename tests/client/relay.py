"""A network between a client and a bank, which can drop its connections without a word to either."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Passes the bytes of each connection on, until ``drop``. Later connections are passed on again."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._dropped: tuple[socket.socket, ...] = ()
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def drop(self) -> None:
        """From now on both ends of the present connections hear nothing more, not even that they are closed."""
        self._dropped = tuple(self._sockets)

    def end(self) -> None:
        self._ended.set()
        for end in (self._listener, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the relay has ended
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self.num_connections += 1
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                data = source.recv(2**16)
                if source in self._dropped:
                    self._ended.wait()
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)


@asynccontextmanager
async def relayed(target: str) -> AsyncIterator[Relay]:
    """A relay to ``target``, which is host:port."""
    relay = Relay(target)
    try:
        yield relay
    finally:
        relay.end()
