"""A prefill-service in memory behind a real socket, with faults to switch on.

It keeps the contracts of protos/prefill/v1: offsets, states, idempotent request ids, rich errors.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import grpc
import grpc.aio
from fake_answers import FakeAnswers
from fake_backend import Backend, Faults, State
from fake_jobs import FakeJobs
from fake_videos import FakeVideos

from prefill.v1 import answer_service_pb2_grpc as answer_grpc
from prefill.v1 import prefill_service_pb2_grpc as prefill_grpc
from prefill.v1 import video_service_pb2_grpc as video_grpc


class FakeServer:
    """Runs the service on a thread of its own; can be stopped and started on the same port."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._backend = Backend()
        self.port = 0
        self._credentials = credentials
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Any = None
        self.start()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def unix_address(self) -> str:
        return f"unix-abstract:fake-prefill-server-{os.getpid()}-{id(self)}"

    @property
    def state(self) -> State:
        return self._backend.state

    @property
    def faults(self) -> Faults:
        return self._backend.faults

    def start(self) -> None:
        self._call(self._start())

    def stop(self) -> None:
        self._call(self._server.stop(0))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def reset(self) -> None:
        self._backend.state = State()
        self._backend.faults = Faults()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _start(self) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.so_reuseport", 0),
            ]
        )
        jobs = FakeJobs(self._backend)
        answers = FakeAnswers(self._backend, jobs)
        video_grpc.add_VideoServiceServicer_to_server(FakeVideos(self._backend), self._server)
        prefill_grpc.add_PrefillServiceServicer_to_server(jobs, self._server)
        answer_grpc.add_AnswerServiceServicer_to_server(answers, self._server)
        address = f"localhost:{self.port}"
        if self._credentials is None:
            self._server.add_insecure_port(self.unix_address)
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        await self._server.start()
