"""A TCP proxy between clients and the service, which stalls, swallows or resets connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from types import TracebackType
from typing import Self

_PIECE = 1 << 16


class Proxy:
    """Passes bytes on both ways, unless it is told to misbehave.

    Attributes:
        target: ``host:port`` of the service; connections are refused without one.
        address: where clients connect.
    """

    def __init__(self) -> None:
        self.target = ""
        self.address = ""
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._swallowing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()

    def stall(self) -> None:
        """Hold back every byte until ``resume``; connections stay open."""
        self._flowing.clear()

    def swallow(self) -> None:
        """Lose every byte until ``resume``: then all connections are reset, as none can go on."""
        self._swallowing = True

    def resume(self) -> None:
        """Pass bytes on again."""
        if self._swallowing:
            self._swallowing = False
            self.reset()
        self._flowing.set()

    def reset(self) -> None:
        """End all connections with a TCP reset."""
        for writer in list(self._writers):
            connection = writer.get_extra_info("socket")
            if connection is not None:
                linger = struct.pack("ii", 1, 0)
                with suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port or 0))
        except OSError:  # nobody listens there
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        try:
            await asyncio.gather(self._pass(reader, up_writer), self._pass(up_reader, writer))
        finally:
            self._writers -= {writer, up_writer}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                await self._flowing.wait()
                if not self._swallowing:
                    writer.write(data)
                    await writer.drain()
        writer.close()
