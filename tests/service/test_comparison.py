"""A comparison mode from a client's call to vLLM's answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import answer_service_pb2_grpc
from prefill.v1 import prefill_service_pb2 as pb

from tests.service.running import running_service
from tests.vllm_server import VllmServer


def test_an_answer_where_all_passes_is_the_exact_one(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    vllm: Callable[[str], VllmServer],
    tmp_path: Path,
) -> None:
    url = vllm("qwen3_vl").url
    with (
        running_service(
            checkpoint("qwen3_vl"), tmp_path, "--ranks", "2", "--vllm-url", url
        ) as service,
        service.client() as client,
        grpc.insecure_channel(service.address) as channel,
    ):
        video = client.upload(make_video(seconds=12.0, fps=10, width=160, height=120))
        exact = client.ask_text(video, "Who?", max_tokens=12, quality="exact", timeout=240)
        answers = answer_service_pb2_grpc.AnswerServiceStub(channel)
        for method, passing in (
            (pb.COMPARISON_METHOD_SPAVA, 1 << 20),
            (pb.COMPARISON_METHOD_APB, 4),
        ):
            comparison = pb.ComparisonSpec(method=method, anchor_tokens=30, passing_tokens=passing)
            request = answer_pb.AskRequest(
                spec=pb.PrefillSpec(video_id=video.video_id, comparison=comparison),
                messages=[answer_pb.ChatMessage(role=answer_pb.ROLE_USER, text="Who?")],
                sampling_params=answer_pb.SamplingParams(max_tokens=12),
            )
            messages = list(answers.Ask(request, timeout=240))
            final = messages[-1].final
            assert final.prefix_id != client.job(exact.job_id).result.prefix_id
            assert final.usage.kv_tokens_moved > 0  # vLLM has not taken one's KV for the other's
            if method == pb.COMPARISON_METHOD_SPAVA:
                ids = [i for message in messages for i in message.delta.token_ids]
                assert ids == list(exact.token_ids)
