"""Spans of real ranks: where they lie, what they say, and that stages overlap."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prefill_service.engine.spans import LayerSpans, Span, SpanBuffer
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.parallel.comm_stats import CommStats
from tests.support.standalone_executor import standalone_executor


def rows(spans: tuple[Span, ...], row: str, name: str = "chunk") -> list[Span]:
    return [span for span in spans if span.row == row and span.name.startswith(name)]


async def test_spans_of_a_real_run(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    """Two ranks, several chunks; times of all processes are of one clock."""
    assert time.get_clock_info("perf_counter").implementation == "clock_gettime(CLOCK_MONOTONIC)"
    assert time.get_clock_info("monotonic").implementation == "clock_gettime(CLOCK_MONOTONIC)"
    video = make_video(seconds=15.0, fps=10, width=160, height=120)
    async with standalone_executor(
        checkpoint("qwen3_vl"), tmp_path, 2, chunk_tokens=70
    ) as standalone:
        plan, _ = await standalone.plan(video, FrameSampling(fps=4.0))
        start = time.perf_counter()
        outcome = await standalone.prefill(standalone.task(video, plan))
        end = time.perf_counter()
        layers = standalone.executor.kv_layout.num_layers
    assert set(outcome.spans) == {0, 1}
    tokens = frames = 0
    for spans in outcome.spans.values():
        assert all(start <= span.start <= span.end <= end for span in spans)
        decode, vision, prefill = (rows(spans, row) for row in ("decode", "vision", "prefill"))
        assert len(prefill) == len(vision) == len(decode) > 3
        frames += sum(int(span.args["frames"]) for span in decode)
        tokens += sum(int(span.args["tokens"]) for span in prefill)
        for one, two, three in zip(decode, vision, prefill, strict=True):
            assert one.end <= two.start <= two.end <= three.start  # a chunk's own stages
        # Frames of later chunks are decoded while earlier ones are encoded and prefilled.
        assert all(decode[i + 1].start < prefill[i].end for i in range(len(decode) - 1))
        overlap = sum(
            max(0.0, min(later.end, done.end) - max(later.start, begun.start))
            for i, (begun, done) in enumerate(zip(vision, prefill, strict=True))
            for later in decode[i + 1 :]
        )
        assert overlap > 0
        parts = [*rows(spans, "prefill", "layer"), *rows(spans, "prefill", "attend")]
        for span in parts:
            assert any(c.start <= span.start and span.end <= c.end for c in prefill)
        assert len(rows(spans, "prefill", "layer")) == layers * len(prefill)
        received = sum(int(c.args["bytes_received"]) for c in prefill)
        assert received == sum(
            int(span.args["bytes_received"]) for span in rows(spans, "prefill", "layer")
        )
        assert received > 0
    assert (frames, tokens) == (len(plan.frame_indices), plan.num_tokens)
    assert outcome.bytes_received == sum(
        int(c.args["bytes_received"]) for s in outcome.spans.values() for c in rows(s, "prefill")
    )


def test_layers_share_spans_where_there_are_many() -> None:
    stats = CommStats()
    spans = SpanBuffer()
    noted = LayerSpans(spans, stats, "prefill", layers=7, chunks=220)  # groups of 4
    for layer in range(7):
        noted.enter_layer(layer)
        stats.received("broadcast", 10 + layer)
        with noted.time_attention():
            pass
    noted.finish_chunk()
    assert [(s.name, s.args["bytes_received"]) for s in spans.spans()] == [
        ("layers 0-3", 10 + 11 + 12 + 13),
        ("layers 4-6", 14 + 15 + 16),
    ]


def test_a_full_buffer_counts_what_it_does_not_keep() -> None:
    spans = SpanBuffer(limit=2)
    for number in range(5):
        spans.note("decode", f"chunk {number}", float(number))
    names = [span.name for span in spans.spans()]
    assert names == ["chunk 0", "chunk 1", "3 slices not kept"]
