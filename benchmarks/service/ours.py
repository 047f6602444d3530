"""The service, asked over gRPC by its client."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from prefill_client import Answer, Client, Job, Video
from typing_extensions import override

from benchmarks.processes import cpu_seconds
from benchmarks.service.cases import BATCH, QUESTIONS, Case
from benchmarks.service.systems import (
    KV_BYTES,
    MAX_TOKENS,
    PENALTY,
    START_S,
    Asked,
    Measured,
    Setup,
    System,
    third_of,
)
from tools.service_process import ServiceProcess

AGREE = "agree"


class Service(System):
    """``prefill-service serve`` with its embedded vLLM.

    Args:
        setup: where to start it.
        ranks: with a share of the cores each; a single one has one core, what each of two has.
    """

    modes: tuple[str, ...] = ("exact", "balanced")

    def __init__(self, setup: Setup, ranks: int = 2) -> None:
        self.name = "ours" if ranks > 1 else "ours-1"
        self.ranks = ranks
        self.cold_start_s = 0.0
        threads = max(1, setup.cores // max(ranks, 2))
        self.arguments = [
            "--model",
            str(setup.checkpoint),
            "--ranks",
            str(ranks),
            "--device",
            "cpu",
            "--engine-threads-per-rank",
            str(threads),
            "--vllm-kv-cache-gib",
            str(KV_BYTES / (1 << 30)),
        ]
        self._data = tempfile.TemporaryDirectory(prefix="data-", dir=setup.folder)
        self._process = ServiceProcess(
            [*self.arguments, "--data-dir", self._data.name], setup.folder / f"service-{ranks}.log"
        )

    def __enter__(self) -> Self:
        start = time.perf_counter()
        self._process.__enter__()
        try:
            self._process.wait_ready(START_S, lambda _: None)
        except BaseException:
            self._process.stop()
            raise
        self.cold_start_s = time.perf_counter() - start
        self._client = Client(self._process.address)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()
        self._process.stop()
        self._data.cleanup()

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @override
    def measure(self, case: Case, mode: str) -> Measured:
        start = time.perf_counter()
        video = self._upload(case.video)
        upload_s = time.perf_counter() - start
        try:
            before = cpu_seconds(self.pid)
            first, answer = self._ask(video, QUESTIONS[0], mode)
            first.cpu_s = cpu_seconds(self.pid) - before
            second, _ = self._ask(video, QUESTIONS[1], mode)
            third = third_of(
                lambda question: self._ask(video, question, mode)[0].first_token_s,
                QUESTIONS[BATCH],
            )
        finally:
            self._client.delete_video(video.video_id)
        job = self._client.job(answer.job_id)
        total = job.result.attention.total if job.result and job.result.attention else None
        return Measured(
            first=first,
            second=second,
            third_of_five_s=third,
            upload_s=upload_s,
            stages=stages(job, answer, first.first_token_s),
            density=total.density if total else 1.0,
            kept_mass=total.kept_mass_mean if total else 1.0,
        )

    def _upload(self, path: Path) -> Video:
        return self._client.upload(path)

    def _ask(self, video: Video, question: str, quality: str) -> tuple[Asked, Answer]:
        start = time.perf_counter()
        stream = self._client.ask(
            video,
            question,
            quality=quality,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            repetition_penalty=PENALTY,
        )
        first = None
        for _ in stream:
            first = first or time.perf_counter() - start
        answer = stream.result()
        return Asked(first or answer.timings.first_token_s, list(answer.token_ids)), answer


def stages(job: Job, answer: Answer, first_token_s: float) -> dict[str, float]:
    """Seconds by stage of a first question, of the slowest rank each; they add up to more or less
    what the client waited, since decoding overlaps the rest and ranks are not equally slow.

    ``agree`` is what the ranks wait for each other, at layers and between chunks; ``linear`` what
    remains of the prefill: matrix products, norms, page writing, agreements within it; ``vllm`` is
    from the question's submission to the first token without the hand-off; ``other`` is what the
    client waited before the ranks began, between stages, and for the network.
    """
    found = {
        stage: max((p.elapsed_s for p in job.progress if p.stage.lower() == stage), default=0.0)
        for stage in ("decode", "vision", "prefill")
    }
    result = job.result
    if result is None:
        return found
    if result.attention:
        total = result.attention.total
        found |= {"select": total.select_s, "attend": total.attend_s, "certify": total.certify_s}
    if result.communication:
        for use in result.communication.collectives:
            name = use.name if use.name == AGREE else "exchange"
            found[name] = found.get(name, 0.0) + use.elapsed_s
    inside = sum(found.get(name, 0.0) for name in ("select", "attend", "certify", "exchange"))
    found["linear"] = max(0.0, found["prefill"] - inside)
    found["handoff"] = answer.timings.handoff_s
    found["vllm"] = max(0.0, answer.timings.decoder_first_token_s - answer.timings.handoff_s)
    known = found["vision"] + found["prefill"] + found["handoff"] + found["vllm"]
    found["other"] = max(0.0, first_token_s - known)
    return found
