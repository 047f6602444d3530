"""KV computed elsewhere, decoded by a real vLLM over HTTP: equality, reuse, faults, aborts."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.server import GenerationServer
from prefill_service.generation.vllm_client import GenerationEvent, GenerationRequest, Sampling
from prefill_service.kv.handoff import PARAMS_KEY, HandoffParams, HandoffReport
from prefill_service.kv.handoff_reports import ReportServer
from prefill_service.kv.manifest import KVLayout, Manifest, hash_token_ids
from tests.generation.oracle import Case, compute
from tests.kv.rank_process import (
    EPOCH,
    WorkerProcess,
    create,
    deal,
    make_manifest,
    publish,
    publish_run,
    rank_processes,
)
from tests.vllm_server import VllmServer

LAYOUT = KVLayout(num_layers=4, kv_heads=2, head_dim=64, dtype="float32", page_tokens=64)
BLOCK = 128  # vLLM's on the CPU
NEW_TOKENS = 16
SIZES = {  # frames, height, width
    ("qwen3_vl", "short"): (16, 128, 160),
    ("qwen3_vl", "long"): (64, 448, 576),
    ("qwen2_5_vl", "short"): (16, 112, 168),
    ("qwen2_5_vl", "long"): (52, 448, 560),
}
FAMILIES = ("qwen3_vl", "qwen2_5_vl")
_names = itertools.count()


@pytest.fixture(scope="module")
def case(checkpoint: Callable[..., Path]) -> Callable[[str, str], Case]:
    @cache
    def get(family: str, size: str) -> Case:
        return compute(checkpoint(family), *SIZES[family, size], new_tokens=NEW_TOKENS)

    return get


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with rank_processes(LAYOUT, 3, tmp_path_factory.mktemp("kv")) as processes:
        yield processes


@dataclass
class Bench:
    """What one test needs: vLLM by URL, a report server, rank processes, a case."""

    generation: GenerationServer
    reports: ReportServer
    ranks: list[WorkerProcess]
    case: Case

    def manifest(self, count: int = 3, chunk: int = 100, **changes: Any) -> Manifest:
        """A fresh prefix id each time, so that vLLM's prefix cache does not know it."""
        plan = self.case.plan
        fields = {
            "prefix_id": f"p{next(_names)}",
            "token_ids_hash": hash_token_ids(plan.token_ids),
            "position_delta": plan.position_delta,
            "model_fingerprint": self.case.fingerprint,
            **changes,
        }
        runs = deal(plan.num_tokens, count, chunk, LAYOUT)
        return make_manifest(LAYOUT, runs, [rank.endpoint for rank in self.ranks], **fields)

    def request(
        self, manifest: Manifest, question: int, lease: str, **sampling: Any
    ) -> GenerationRequest:
        return GenerationRequest(
            token_ids=self.case.prompts[question],
            plan=replace(self.case.plan, prefix_id=manifest.prefix_id),
            handoff=HandoffParams(manifest, lease, self.reports.address),
            sampling=Sampling(max_tokens=NEW_TOKENS, **sampling),
            request_id=f"test-{next(_names)}",
        )

    async def ask(self, request: GenerationRequest) -> tuple[list[int], list[GenerationEvent]]:
        events = [event async for event in self.generation.generate(request)]
        return [token for event in events for token in event.token_ids], events

    async def report(self, lease: str) -> HandoffReport:
        report = await self.reports.wait(lease, 10)
        assert report is not None, "no report arrived"
        return report

    async def publish(self, manifest: Manifest, lease: str) -> None:
        await asyncio.to_thread(publish, manifest, self.ranks, self.case.kv, lease)

    async def assert_right(self, question: int = 0) -> None:
        """A healthy hand-off gives the right answer."""
        manifest = self.manifest()
        await self.publish(manifest, "fine")
        tokens, _ = await self.ask(self.request(manifest, question, "fine"))
        assert tokens == self.case.answers[question]

    async def error_of(self, request: GenerationRequest) -> tuple[ServiceError, dict[str, Any]]:
        """What the client gets, and the precise cause from the report."""
        with pytest.raises(ServiceError) as caught:
            await self.ask(request)
        report = await self.report(request.handoff.lease_id)
        assert not report.ok
        assert report.error is not None
        return caught.value, report.error


@pytest.fixture
def bench(
    vllm: Callable[[str], VllmServer],
    ranks: list[WorkerProcess],
    case: Callable[[str, str], Case],
    tmp_path: Path,
) -> Callable[..., Any]:
    @asynccontextmanager
    async def open_bench(family: str = "qwen3_vl", size: str = "short") -> AsyncIterator[Bench]:
        loaded = await asyncio.to_thread(case, family, size)
        server = await asyncio.to_thread(vllm, family)
        generation = GenerationServer(server.config, str(server.model), "float32", tmp_path)
        reports = ReportServer(tmp_path / "reports.sock")
        await reports.start()
        await generation.start()
        try:
            yield Bench(generation, reports, ranks, loaded)
        finally:
            await generation.stop()
            await reports.stop()

    return open_bench


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "count"), [("short", 1), ("short", 2), ("short", 3), ("long", 3)])
async def test_answers_equal_transformers_and_the_second_moves_less_than_a_block(
    bench: Callable[..., Any], family: str, size: str, count: int
) -> None:
    async with bench(family, size) as b:
        plan = b.case.plan
        chunk = 1000 if size == "long" else 70
        manifest = b.manifest(count, chunk)
        await b.publish(manifest, "first")
        for rank in b.ranks:
            rank.store("grant_lease", manifest.prefix_id, "second", 60)

        tokens, events = await b.ask(b.request(manifest, 0, "first"))
        assert tokens == b.case.answers[0]
        assert events[-1].prompt_tokens == len(b.case.prompts[0])
        assert events[-1].completion_tokens == len(tokens)
        assert events[-1].finish_reason in ("length", "stop")
        first = await b.report("first")
        assert (first.ok, first.tokens) == (True, plan.num_tokens)
        assert first.bytes >= plan.num_tokens * LAYOUT.token_bytes

        tokens, events = await b.ask(b.request(manifest, 1, "second"))
        assert tokens == b.case.answers[1]
        second = await b.report("second")
        assert (second.ok, second.tokens) == (True, plan.num_tokens % BLOCK)
        assert events[-1].cached_tokens >= plan.num_tokens


async def test_same_question_again_moves_nothing_and_is_reported(
    bench: Callable[..., Any],
) -> None:
    async with bench() as b:
        # A prefix of whole blocks is all in vLLM's own cache the second time.
        case = b.case
        keep = b.case.plan.num_tokens
        extra = -keep % BLOCK
        manifest = b.manifest()
        await b.publish(manifest, "one")
        long_prompt = [*case.prompts[0], *case.prompts[0][-extra - 200 :]]
        request = replace(b.request(manifest, 0, "one"), token_ids=long_prompt)
        expected, _ = await b.ask(request)
        again = replace(request, handoff=replace(request.handoff, lease_id="two"))
        tokens, _ = await b.ask(replace(again, request_id="again"))
        assert tokens == expected
        assert (await b.report("two")) == HandoffReport("two", True, 0, 0, 0.0)


async def test_text_is_streamed_and_stops(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        manifest = b.manifest()
        await b.publish(manifest, "lease")
        _, events = await b.ask(b.request(manifest, 0, "lease"))
        text = "".join(event.text for event in events)
        assert len([event for event in events if event.text]) > 1
        stop = text[len(text) // 2 :][:3]
        _, events = await b.ask(b.request(manifest, 0, "lease", stop=(stop,)))
        assert "".join(event.text for event in events) == text[: text.index(stop)]
        assert events[-1].finish_reason == "stop"


async def test_asked_while_the_prefix_is_being_computed(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        manifest = b.manifest(3, 40)
        for rank in b.ranks:  # the lease announces it; nothing is created yet
            rank.store("grant_lease", manifest.prefix_id, "lease", 60)
        asking = asyncio.create_task(b.ask(b.request(manifest, 0, "lease")))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(create, manifest, b.ranks, "lease")
        for run in manifest.runs:
            await asyncio.sleep(0.1)
            assert not asking.done()
            await asyncio.to_thread(publish_run, manifest, run, b.ranks, b.case.kv)
        tokens, _ = await asking
        assert tokens == b.case.answers[0]


async def test_many_at_once_good_and_bad(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        requests = []
        expected = []
        for i in range(6):
            manifest = b.manifest(1 + i % 3, 64)
            if i % 3 != 2:  # every third prefix is unknown
                await b.publish(manifest, f"lease{i}")
            requests.append(b.request(manifest, i % 2, f"lease{i}"))
            expected.append(b.case.answers[i % 2])
        results = await asyncio.gather(*map(b.ask, requests), return_exceptions=True)
        for i, result in enumerate(results):
            if i % 3 == 2:
                assert isinstance(result, ServiceError)
            else:
                assert not isinstance(result, BaseException)
                assert result[0] == expected[i]


async def test_a_short_question_is_answered_while_a_long_one_is_taken_in(
    bench: Callable[..., Any],
) -> None:
    async with bench() as b:
        manifest = b.manifest()
        for lease in ("long", "short"):
            await b.publish(manifest, lease)
        long = b.request(manifest, 0, "long")
        suffix = long.token_ids[b.case.plan.num_tokens :]
        long = replace(long, token_ids=[*long.token_ids[:-1], *suffix * (6000 // len(suffix))])
        order = []

        async def ask(name: str, request: GenerationRequest) -> list[int]:
            tokens, _ = await b.ask(request)
            order.append(name)
            return tokens

        with b.reports.follow_intake("long") as intake:
            asking = asyncio.create_task(ask("long", long))
            begun = await asyncio.wait_for(intake.wait_report(), 60)
            assert b.case.plan.num_tokens < begun.computed_tokens < begun.prompt_tokens
            assert begun.prompt_tokens == len(long.token_ids)
            tokens = await ask("short", b.request(manifest, 1, "short"))
            expected = await asking
        assert order == ["short", "long"]
        assert tokens == b.case.answers[1]
        # In chunks of another size, since nothing is beside it and most of it is known.
        again = replace(long, request_id="again", handoff=replace(long.handoff, lease_id="short"))
        assert (await b.ask(again))[0] == expected


FAULTS = ("corrupt", "expired", "stale", "unknown", "dead", "failed")


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_of_the_source_fails_that_request_alone(
    bench: Callable[..., Any], fault: str, tmp_path: Path
) -> None:
    async with bench() as b:
        manifest = b.manifest()
        lease = f"lease-{fault}"
        if fault in ("corrupt", "expired", "stale"):
            await b.publish(manifest, lease)
        if fault == "corrupt":
            b.ranks[1].writer(manifest.prefix_id, "corrupt", 0, 123)
        elif fault == "expired":
            for rank in b.ranks:
                rank.store("release_lease", manifest.prefix_id, lease)
        elif fault == "stale":
            manifest = replace(manifest, epoch=EPOCH - 1)
        elif fault == "dead":
            manifest = replace(manifest, endpoints=(f"unix:{tmp_path}/gone.sock",) * 3)
        elif fault == "failed":
            await asyncio.to_thread(create, manifest, b.ranks, lease)
            error = ServiceError(Reason.RANK_DIED, "rank 2 died", rank=2)
            for rank in b.ranks:
                rank.writer(manifest.prefix_id, "fail", error)
        error, cause = await b.error_of(b.request(manifest, 0, lease))
        assert error.reason == Reason.DECODER_FAILED
        expected = {
            "corrupt": Reason.KV_CORRUPT,
            "expired": Reason.LEASE_EXPIRED,
            "stale": Reason.STALE_GENERATION,
            "unknown": Reason.UNKNOWN_PREFIX,
            "dead": Reason.HANDOFF_FAILED,
            "failed": Reason.RANK_DIED,
        }
        assert cause["reason"] == expected[fault]
        await b.assert_right()


async def test_source_killed_in_mid_transfer(bench: Callable[..., Any], tmp_path: Path) -> None:
    async with bench() as b:
        with rank_processes(LAYOUT, 2, tmp_path) as mortal:
            manifest = replace(b.manifest(2, 50), endpoints=tuple(r.endpoint for r in mortal))
            create(manifest, mortal, "lease")
            publish_run(manifest, manifest.runs[0], mortal, b.case.kv)
            asking = asyncio.create_task(b.error_of(b.request(manifest, 0, "lease")))
            await asyncio.sleep(1)
            mortal[1].kill()
            error, cause = await asking
        assert error.reason == Reason.DECODER_FAILED
        assert cause["reason"] == Reason.HANDOFF_FAILED
        assert cause["metadata"]["rank"] == "1"
        await b.assert_right()


REFUSALS = {
    "hash": (Reason.KV_MISMATCH, "have hash"),
    "layout": (Reason.KV_MISMATCH, "layers, KV heads, head size"),
    "weights": (Reason.KV_MISMATCH, "the KV is of checkpoint feed"),
    "short prompt": (Reason.INVALID_REQUEST, "at least one more"),
    "no item": (Reason.INVALID_REQUEST, "no multimodal item"),
    "item beyond": (Reason.INVALID_REQUEST, "beyond the prefix"),
    "prompt_logprobs": (Reason.INVALID_REQUEST, "prompt_logprobs"),
    "malformed": (Reason.INVALID_REQUEST, "manifest"),
    "address": (Reason.HANDOFF_FAILED, "expected unix:/path"),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_request_that_must_not_be_computed_is_refused(
    bench: Callable[..., Any], what: str
) -> None:
    """Each of these would kill the engine or answer wrongly if vLLM computed it."""
    async with bench() as b:
        manifest = b.manifest()
        lease = f"lease-{what.replace(' ', '-')}"
        await b.publish(manifest, lease)
        body = _body(b.request(manifest, 0, lease))
        entry = body["kv_transfer_params"][PARAMS_KEY]
        num_tokens = b.case.plan.num_tokens
        if what == "hash":
            body["token_ids"][2] += 1
        elif what == "layout":
            changed = replace(manifest, layout=replace(LAYOUT, kv_heads=4))
            entry["manifest"] = changed.to_json()
        elif what == "weights":
            entry["manifest"] = replace(manifest, model_fingerprint="feed").to_json()
        elif what == "short prompt":
            body["token_ids"] = body["token_ids"][:num_tokens]
        elif what == "no item":
            del body["features"]
        elif what == "item beyond":
            body["features"]["mm_placeholders"]["video"][0]["length"] = num_tokens
        elif what == "prompt_logprobs":
            body["sampling_params"]["prompt_logprobs"] = 1
        elif what == "malformed":
            entry["manifest"] = "{}"
        elif what == "address":
            entry["manifest"] = replace(manifest, endpoints=("tcp://x:1",) * 3).to_json()
        url = f"{b.generation.url}/inference/v1/generate"
        async with (
            aiohttp.ClientSession(headers=b.generation.headers) as session,
            session.post(url, json=body) as response,
        ):
            text = await response.text()
        assert "token_ids" not in text, text
        report = await b.report(lease)
        assert report.error is not None
        reason, words = REFUSALS[what]
        assert report.error["reason"] == reason, report.error
        assert words in report.error["message"]
        await b.assert_right()


def _body(request: GenerationRequest) -> dict[str, Any]:
    from prefill_service.generation.grid_item import video_features

    return {
        "token_ids": list(request.token_ids),
        "features": video_features(request.plan),
        "sampling_params": request.sampling.to_vllm(),
        "kv_transfer_params": request.handoff.to_kv_transfer_params(),
    }


async def test_abort_during_the_load(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        manifest = b.manifest(3, 40)
        create(manifest, b.ranks, "lease")
        publish_run(manifest, manifest.runs[0], b.ranks, b.case.kv)
        async with aclosing(b.generation.generate(b.request(manifest, 0, "lease"))) as events:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 1)
        report = await b.report("lease")
        assert report.error is not None
        assert report.error["reason"] == Reason.CANCELLED
        # The blocks are free again: the same prefix, now complete, is loaded into others.
        for run in manifest.runs[1:]:
            publish_run(manifest, run, b.ranks, b.case.kv)
        for rank in b.ranks:
            rank.store("grant_lease", manifest.prefix_id, "again", 60)
        tokens, _ = await b.ask(b.request(manifest, 0, "again"))
        assert tokens == b.case.answers[0]
        await b.assert_right(1)


async def test_abort_while_decoding(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        manifest = b.manifest()
        await b.publish(manifest, "lease")
        request = b.request(manifest, 0, "lease", ignore_eos=True)
        request = replace(request, sampling=replace(request.sampling, max_tokens=20000))
        async with aclosing(b.generation.generate(request)) as events:
            await anext(events)
        await _until_idle(b.generation.url)
        await b.assert_right()


async def _until_idle(url: str) -> None:
    """Until vLLM runs nothing: an answer of 20,000 tokens would take minutes."""
    deadline = time.monotonic() + 10
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            async with session.get(f"{url}/metrics") as response:
                lines = (await response.text()).splitlines()
            running = [line for line in lines if line.startswith("vllm:num_requests_running")]
            if running and all(float(line.split()[-1]) == 0 for line in running):
                return
            await asyncio.sleep(0.1)
    raise AssertionError("the aborted request still runs")


async def test_requests_of_others_pass_untouched(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        body = {
            "model": "prefill-service",
            "prompt": b.case.prompts[0][-10:],
            "max_tokens": 4,
            "temperature": 0,
            "kv_transfer_params": {"somebody_else": True},
        }
        url = f"{b.generation.url}/v1/completions"
        async with (
            aiohttp.ClientSession(headers=b.generation.headers) as session,
            session.post(url, json=body) as response,
        ):
            answer = await response.json()
        assert response.status == 200, answer
        assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/generate"])
async def test_who_has_no_key_is_refused(bench: Callable[..., Any], path: str) -> None:
    """Other users of the machine reach vLLM's port, and could ask it about our prefixes."""
    async with bench() as b:
        body = {"model": "prefill-service", "prompt": [1], "token_ids": [1], "max_tokens": 1}
        url = f"{b.generation.url}{path}"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            assert response.status == 401


async def test_vllms_own_refusal_is_quoted(bench: Callable[..., Any]) -> None:
    async with bench() as b:
        manifest = b.manifest()
        request = b.request(manifest, 0, "lease", top_p=7.0)
        with pytest.raises(ServiceError, match="top_p") as caught:
            await b.ask(request)
        assert caught.value.reason == Reason.DECODER_FAILED
        assert caught.value.metadata["http_status"] == "400"
