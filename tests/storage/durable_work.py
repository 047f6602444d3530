"""What a service writes: ``python -m tests.storage.durable_work FOLDER VIDEO SEED``.

Beside the data folder it writes what a client has been answered, one line of JSON for each event.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.scheduling.job import JobRecord, JobState, PrefillSpec
from prefill_service.scheduling.job_store import JobStore
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex
from prefill_service.video.repository import VideoRepository
from prefill_service.video.store import VideoStore
from prefill_service.video.uploads import Uploads

EVENTS = "events"
"""Not on the disk that loses power: clients remember their answers."""

INDEX = VideoIndex(
    container="mov",
    codec="h264",
    geometry=Geometry.square(16, 16, 4),
    time_base=(1, 10),
    pts=np.arange(4),
    keyframe=np.ones(4, bool),
    times_s=np.arange(4) / 10,
    fps=10.0,
    duration_s=0.4,
)


class Work:
    """Uploads, deletions and jobs in a random order, each reported when it is done."""

    def __init__(self, folder: Path, data: bytes, seed: int) -> None:
        self._folder = folder
        self._data = data
        self._chance = random.Random(seed)
        self._ready: list[str] = []
        self._queued: list[JobRecord] = []
        self._events = -1

    async def run(self, steps: int) -> None:
        self._events = os.open(self._folder / EVENTS, os.O_WRONLY | os.O_CREAT, 0o600)
        storage = StorageConfig(data_dir=str(self._folder / "data"), min_free_bytes=0)
        repository = VideoRepository.open(storage)
        uploads = Uploads(repository, storage)
        store = VideoStore(repository, uploads, VideoConfig())
        jobs = JobStore.open(self._folder / "data" / "jobs.db")
        for step in range(steps):
            match self._chance.choice(("upload", "upload", "delete", "job", "job", "cancel")):
                case "upload":
                    self._upload(uploads, step)
                case "delete" if self._ready:
                    await self._delete(store)
                case "job":
                    await self._create_job(jobs)
                case "cancel" if self._queued:
                    await self._cancel_job(jobs)
        await store.close()
        jobs.close()

    def _report(self, event: str, name: str, **values: object) -> None:
        line = json.dumps({"event": event, "name": name, **values})
        os.write(self._events, f"{line}\n".encode())

    def _upload(self, uploads: Uploads, step: int) -> None:
        data = self._data + step.to_bytes(4, "big")
        sha256 = hashlib.sha256(data).hexdigest()
        request = f"request-{step}"
        made = uploads.create("v", len(data), sha256, request, allow_truncated=False)
        self._report("created", made.video_id, request=request)
        middle = self._chance.randrange(1, len(data))
        uploads.append_chunk(made.video_id, 0, data[:middle])
        if self._chance.random() < 0.2:
            return
        uploads.append_chunk(made.video_id, middle, data[middle:])
        uploads.begin_indexing(made.video_id)
        uploads.accept(made.video_id, INDEX)
        self._report("ready", made.video_id, sha256=sha256)
        self._ready.append(made.video_id)

    async def _delete(self, store: VideoStore) -> None:
        video_id = self._ready.pop(self._chance.randrange(len(self._ready)))
        self._report("deleting", video_id)
        await store.delete_video(video_id)
        self._report("deleted", video_id)

    async def _create_job(self, jobs: JobStore) -> None:
        spec = PrefillSpec("vid_1", FrameSampling(num_frames=8), "x" * self._chance.randrange(9000))
        number = self._chance.getrandbits(64)
        record = JobRecord(f"job_{number:x}", spec, "p", 10, explicit=True, create_time=4e9)
        jobs.insert_record(record, f"request-{number:x}")
        if self._chance.random() < 0.7:  # else nobody waits for it
            await jobs.sync()
            self._report("job", record.job_id, request=f"request-{number:x}")
            self._queued.append(record)

    async def _cancel_job(self, jobs: JobStore) -> None:
        record = self._queued.pop()
        jobs.update_record(replace(record, state=JobState.CANCELLED))
        await jobs.sync()
        self._report("cancelled", record.job_id)


if __name__ == "__main__":
    root, video, seed_text, steps_text = sys.argv[1:]
    work = Work(Path(root), Path(video).read_bytes(), int(seed_text))
    asyncio.run(work.run(int(steps_text)))
