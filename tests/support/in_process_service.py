"""The real service around simulated backends, on a real port, and fixtures that start it."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prefill.v1 import (
    answer_service_pb2 as answer_pb,
)
from prefill.v1 import (
    answer_service_pb2_grpc,
    prefill_service_pb2_grpc,
    video_service_pb2_grpc,
)
from prefill.v1 import (
    prefill_service_pb2 as prefill_pb,
)

from prefill_service.cli.config_loading import resolve_config
from prefill_service.config import ServiceConfig, StorageConfig, VideoConfig
from prefill_service.service import Components, Service
from prefill_service.video.store import VideoStore
from tests.support.simulated_backends import (
    SimulatedExecutor,
    SimulatedGenerationServer,
    SimulatedPlanner,
)


class InProcessService:
    """A running service, its backends, and a client of each of its three services."""

    def __init__(
        self,
        service: Service,
        executor: SimulatedExecutor,
        generation: SimulatedGenerationServer,
        video_id: str,
    ) -> None:
        self.service = service
        self.executor = executor
        self.generation = generation
        self.video_id = video_id
        self.task: asyncio.Task[None]
        self.lines: list[str] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.service.port}"

    def connect(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.videos = video_service_pb2_grpc.VideoServiceStub(channel)
        self.prefills = prefill_service_pb2_grpc.PrefillServiceStub(channel)
        self.answers = answer_service_pb2_grpc.AnswerServiceStub(channel)

    def spec(self, frames: int = 8, system_prompt: str = "") -> prefill_pb.PrefillSpec:
        return prefill_pb.PrefillSpec(
            video_id=self.video_id,
            sampling=prefill_pb.FrameSampling(num_frames=frames),
            system_prompt=system_prompt,
        )

    async def create(self, frames: int = 8, request_id: str = "") -> prefill_pb.PrefillJob:
        request = prefill_pb.CreatePrefillJobRequest(spec=self.spec(frames), request_id=request_id)
        return (await self.prefills.CreatePrefillJob(request)).job

    async def get(self, job_id: str) -> prefill_pb.PrefillJob:
        request = prefill_pb.GetPrefillJobRequest(job_id=job_id)
        return (await self.prefills.GetPrefillJob(request)).job

    async def ended(self, job_id: str) -> list[prefill_pb.PrefillJob]:
        """Watch a job to its end."""
        request = prefill_pb.WatchPrefillJobRequest(job_id=job_id)
        return [message.job async for message in self.prefills.WatchPrefillJob(request)]

    def ask(self, frames: int = 8, text: str = "What?", timeout: float = 20, **params: Any) -> Any:
        """The call; iterate it, or give it to ``answer``."""
        request = answer_pb.AskRequest(
            spec=self.spec(frames),
            messages=[answer_pb.ChatMessage(role=answer_pb.ROLE_USER, text=text)],
            sampling_params=answer_pb.SamplingParams(**params),
        )
        return self.answers.Ask(request, timeout=timeout)

    async def until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.01)


class Answer:
    """A whole answer."""

    def __init__(self, messages: list[answer_pb.AskResponse]) -> None:
        self.kinds = [message.WhichOneof("event") for message in messages]
        self.progress = [
            message.progress.job for message in messages if message.HasField("progress")
        ]
        self.text = "".join(message.delta.text for message in messages)
        self.token_ids = [i for message in messages for i in message.delta.token_ids]
        self.final = messages[-1].final


async def answer(call: Any) -> Answer:
    return Answer([message async for message in call])


async def error_of(awaitable: Any) -> tuple[grpc.StatusCode, str, dict[str, str], list[str]]:
    """Status, reason, metadata and detail types of the error a call ends with."""
    try:
        result = await awaitable
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)
        if status is None:
            return error.code(), "", {}, []
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.domain == "prefill-service"
        kinds = [detail.TypeName().rpartition(".")[2] for detail in status.details]
        return error.code(), info.reason, dict(info.metadata), kinds
    raise AssertionError(f"no error, but {result!r}")


Template = tuple[Path, str]


@asynccontextmanager
async def serving(
    data_dir: Path,
    template: Template,
    executor: SimulatedExecutor | None = None,
    generation: SimulatedGenerationServer | None = None,
    *,
    connect: bool = True,
    wait: bool = True,
    components: Mapping[str, Any] | None = None,
    **sections: dict[str, Any],
) -> AsyncIterator[InProcessService]:
    """Run a service on a copy of the template's data; sections are configuration.

    Args:
        components: further ones, or others, by their name in ``Components``.
    """
    source, video_id = template
    if not data_dir.exists():
        shutil.copytree(source, data_dir)
    sections["storage"] = {"data_dir": str(data_dir), **sections.get("storage", {})}
    sections["server"] = {"port": 0, **sections.get("server", {})}
    sections["engine"] = {"model": "sim", **sections.get("engine", {})}
    executor = executor or SimulatedExecutor()
    generation = generation or SimulatedGenerationServer(executor)

    def build(config: ServiceConfig, data: Path, runtime: Path) -> Components:
        given = {"planner": SimulatedPlanner(), "executor": executor, "generation": generation}
        return Components(**{**given, **(components or {})})  # type: ignore[arg-type]

    service = Service(resolve_config(None, sections).config, build)
    running = InProcessService(service, executor, generation, video_id)
    running.task = asyncio.create_task(service.run(running.lines.append))
    started = asyncio.create_task(service.started.wait())
    try:
        if wait:
            await asyncio.wait({running.task, started}, return_when=asyncio.FIRST_COMPLETED)
            if running.task.done():
                running.task.result()
        else:
            await running.until(lambda: service.port > 0)
        if connect:
            async with grpc.aio.insecure_channel(running.address) as channel:
                running.connect(channel)
                yield running
        else:
            yield running
    finally:
        started.cancel()
        service.shut_down()
        service.shut_down()
        with suppress(Exception):
            async with asyncio.timeout(10):
                await running.task


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("template") / "data"
    data = make_video(seconds=2).read_bytes()

    async def fill() -> str:
        store = VideoStore.open(StorageConfig(data_dir=str(folder)), VideoConfig())
        digest = hashlib.sha256(data).hexdigest()
        video = await store.create_upload("video.mp4", len(data), digest)
        await store.append_chunk(video.video_id, 0, data)
        await store.finish_upload(video.video_id)
        await store.close()
        return video.video_id

    return folder, asyncio.run(fill())


@pytest.fixture
def serve(tmp_path: Path, template: tuple[Path, str]) -> Callable[..., Any]:
    """``async with serve(engine={...}) as s``: a service on its own data directory."""
    return partial(serving, tmp_path / "data", template)


async def health(channel: grpc.aio.Channel, service: str = "") -> str:
    """The serving status by name; that of the whole server without a service."""
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
