"""A baseline from a client's call to vLLM's answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefill_client import Comparison, ComparisonMethod

from tests.support.service_process import service_process
from tests.vllm_server import VllmServer


def test_an_answer_where_all_passes_is_the_exact_one(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    vllm: Callable[[str], VllmServer],
    tmp_path: Path,
) -> None:
    arguments = ("--ranks", "2", *vllm("qwen3_vl").arguments)
    with (
        service_process(checkpoint("qwen3_vl"), tmp_path, *arguments) as service,
        service.client() as client,
    ):
        video = client.upload(make_video(seconds=12.0, fps=10, width=160, height=120))
        exact = client.ask(video, "Who?", max_tokens=12, quality="exact", timeout=240).result()
        for method, passing in ((ComparisonMethod.SPAVA, 1 << 20), (ComparisonMethod.APB, 4)):
            found = client.ask(
                video,
                "Who?",
                comparison=method,
                anchor_tokens=30,
                passing_tokens=passing,
                max_tokens=12,
                timeout=240,
            ).result()
            job = client.job(found.job_id)
            assert job.spec.comparison == Comparison(method, "Who?", 30, passing)
            assert job.result.prefix_id != client.job(exact.job_id).result.prefix_id
            assert found.usage.kv_tokens_moved > 0  # vLLM has not taken one's KV for the other's
            if method is ComparisonMethod.SPAVA:
                assert found.token_ids == exact.token_ids
