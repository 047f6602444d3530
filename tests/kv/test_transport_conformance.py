"""What every transport must satisfy: pages from worker processes to a reader, and its faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport.base import Transport
from prefill_service.kv.transport_registry import TRANSPORTS, find_transport, transport_of
from prefill_service.kv.vllm_connector.page_client import PageClient
from tests.kv.rank_process import (
    EPOCH,
    LAYOUT,
    WorkerProcess,
    create,
    deal,
    make_manifest,
    publish,
    publish_run,
    random_kv,
    rank_processes,
)
from tests.kv.toy_transport import ToyTransport


@pytest.fixture(scope="module", params=[*TRANSPORTS, ToyTransport.scheme])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == ToyTransport.scheme:
            patch.setitem(TRANSPORTS, ToyTransport.scheme, ToyTransport())
        yield TRANSPORTS[request.param]


@pytest.fixture(scope="module")
def ranks(
    transport: Transport, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[WorkerProcess]]:
    with rank_processes(LAYOUT, 3, tmp_path_factory.mktemp("kv"), transport) as processes:
        yield processes


@pytest.fixture
def manifest(ranks: list[WorkerProcess], request: pytest.FixtureRequest) -> Iterator[Manifest]:
    """45 tokens on three ranks, runs of 10 with partly filled last pages; not yet created."""
    runs = deal(45, 3, 10, LAYOUT)
    endpoints = [rank.endpoint for rank in ranks]
    yield make_manifest(LAYOUT, runs, endpoints, prefix_id=request.node.name)
    for rank in ranks:
        rank.store("drop_prefix", request.node.name)


def fetch_tokens(manifest: Manifest, lease: str, start: int = 0, end: int = -1) -> torch.Tensor:
    """[layers, 2, tokens, heads, head_dim] of the pages, joined."""
    end = manifest.num_tokens if end < 0 else end
    parts = []
    with PageClient(manifest, lease, timeout_s=20) as client:
        for batch in client.fetch(start, end):
            size = manifest.layout.page_tokens
            for i, page in enumerate(batch.pages):  # no gap within a batch
                assert page.start_token == batch.pages[0].start_token + i * size
            for page, data in zip(batch.pages, batch.data, strict=True):
                parts.append(data[:, :, : page.num_tokens])
                assert not data[:, :, page.num_tokens :].any(), "the tail of a page must be zero"
    return torch.cat(parts, 2)


def error_of(manifest: Manifest, lease: str = "lease") -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        fetch_tokens(manifest, lease)
    return caught.value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_tokens", [1, 4, 64])
def test_every_token_arrives_in_order(
    transport: Transport, tmp_path: Path, dtype: str, page_tokens: int
) -> None:
    layout = replace(LAYOUT, dtype=dtype, page_tokens=page_tokens)
    store = ShardStore(layout, EPOCH)
    server = transport.serve(store, tmp_path, "r")
    server.start()
    kv = random_kv(layout, 45)
    manifest = make_manifest(layout, deal(45, 1, 10, layout), [server.endpoint])
    writer = store.create_pages("prefix", EPOCH, manifest.runs[-1].first_page + 5)
    store.grant_lease("prefix", "lease", 30)
    for run in manifest.runs:
        for layer in range(layout.num_layers):
            part = kv[layer, :, run.start_token : run.end_token]
            writer.write(layer, run.first_page, part[0], part[1])
        writer.seal_pages(run.first_page, layout.pages_for(run.end_token - run.start_token))
    assert torch.equal(fetch_tokens(manifest, "lease"), kv)
    server.close()


def test_three_ranks_interleave(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    kv = random_kv(LAYOUT, 45)
    publish(manifest, ranks, kv, "lease")
    assert torch.equal(fetch_tokens(manifest, "lease"), kv)
    # Whole pages that hold a token of [13, 27): from 10 (run start) to 28 (page end).
    assert torch.equal(fetch_tokens(manifest, "lease", 13, 27), kv[:, :, 10:28])


def test_early_pages_are_used_while_later_ones_are_computed(
    ranks: list[WorkerProcess], manifest: Manifest
) -> None:
    kv = random_kv(LAYOUT, 45)
    create(manifest, ranks, "lease")
    publish_run(manifest, manifest.runs[0], ranks, kv)
    with PageClient(manifest, "lease", timeout_s=20) as client:
        batches = client.fetch()
        first = next(batches)  # all of run 0
        assert [page.start_token for page in first.pages] == [0, 4, 8]
        results: list[int] = []
        reader = threading.Thread(
            target=lambda: results.extend(b.pages[-1].start_token for b in batches)
        )
        reader.start()
        time.sleep(0.3)
        assert results == []  # run 1 is not there yet
        for run in manifest.runs[1:]:
            publish_run(manifest, run, ranks, kv)
        reader.join(10)
        assert results == [18, 28, 38, 44]


def test_lease_may_come_before_the_prefix(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    for rank in ranks:
        rank.store("grant_lease", manifest.prefix_id, "lease", 20)
    result: list[torch.Tensor] = []
    reader = threading.Thread(target=lambda: result.append(fetch_tokens(manifest, "lease")))
    reader.start()
    time.sleep(0.3)
    kv = random_kv(LAYOUT, 45)
    publish(manifest, ranks, kv, "lease")
    reader.join(10)
    assert torch.equal(result[0], kv)


def test_unknown_prefix(manifest: Manifest) -> None:
    error = error_of(manifest)
    assert error.reason == Reason.UNKNOWN_PREFIX
    assert manifest.prefix_id in error.message


def test_stale_epoch(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    newer = replace(manifest, epoch=EPOCH + 1)
    publish(newer, ranks, random_kv(LAYOUT, 45), "lease")
    error = error_of(manifest)
    assert error.reason == Reason.STALE_GENERATION
    assert error.metadata["generation"] == str(EPOCH)
    assert error.metadata["current_generation"] == str(EPOCH + 1)


def test_manifest_of_an_earlier_group_is_stale_even_if_the_prefix_is_gone(
    manifest: Manifest,
) -> None:
    assert error_of(replace(manifest, epoch=1)).reason == Reason.STALE_GENERATION


def test_lease_that_was_never_granted(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    publish(manifest, ranks, random_kv(LAYOUT, 45), "lease")
    error = error_of(manifest, "other")
    assert error.reason == Reason.LEASE_EXPIRED
    assert error.metadata["lease_id"] == "other"


def test_lease_expires_while_waiting_although_connected(
    ranks: list[WorkerProcess], manifest: Manifest
) -> None:
    create(manifest, ranks, "lease", ttl_s=0.4)
    begin = time.monotonic()
    assert error_of(manifest).reason == Reason.LEASE_EXPIRED
    assert 0.2 < time.monotonic() - begin < 5


def test_renewed_lease_lives_on(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    create(manifest, ranks, "lease", ttl_s=0.5)
    kv = random_kv(LAYOUT, 45)
    result = []
    reader = threading.Thread(target=lambda: result.append(fetch_tokens(manifest, "lease")))
    reader.start()
    for _ in range(5):
        time.sleep(0.2)
        for rank in ranks:
            rank.store("grant_lease", manifest.prefix_id, "lease", 0.5)
    for rank in ranks:
        rank.store("grant_lease", manifest.prefix_id, "lease", 20)
    for run in manifest.runs:
        publish_run(manifest, run, ranks, kv)
    reader.join(10)
    assert torch.equal(result[0], kv)


@pytest.mark.parametrize("how", ["release", "drop", "fail", "replace"])
def test_waiting_reader_is_told_at_once(
    ranks: list[WorkerProcess], manifest: Manifest, how: str
) -> None:
    create(manifest, ranks, "lease")
    caught: list[ServiceError] = []
    reader = threading.Thread(target=lambda: caught.append(error_of(manifest)))
    reader.start()
    time.sleep(0.3)
    rank = ranks[0]
    prefix_id = manifest.prefix_id
    begin = time.monotonic()
    if how == "release":
        rank.store("release_lease", prefix_id, "lease")
    elif how == "drop":
        rank.store("drop_prefix", prefix_id)
    elif how == "fail":
        rank.writer(prefix_id, "fail", ServiceError(Reason.RANK_DIED, "rank 2 died", rank=2))
    else:
        rank.store("create_pages", prefix_id, EPOCH + 1, 8)
    reader.join(10)
    assert time.monotonic() - begin < 2
    expected = {
        "release": Reason.LEASE_EXPIRED,
        "drop": Reason.UNKNOWN_PREFIX,
        "fail": Reason.RANK_DIED,
        "replace": Reason.STALE_GENERATION,
    }
    assert caught[0].reason == expected[how]


def test_flipped_byte_names_page_rank_and_checksums(
    ranks: list[WorkerProcess], manifest: Manifest
) -> None:
    publish(manifest, ranks, random_kv(LAYOUT, 45), "lease")
    ranks[1].writer(manifest.prefix_id, "corrupt", 2, 77)
    error = error_of(manifest)
    assert error.reason == Reason.KV_CORRUPT
    assert (error.metadata["page"], error.metadata["rank"]) == ("2", "1")
    assert error.metadata["actual"] != error.metadata["expected"]
    assert error.metadata["actual"] in error.message
    assert error.metadata["expected"] in error.message


def test_source_killed_in_mid_transfer(transport: Transport, tmp_path: Path) -> None:
    with rank_processes(LAYOUT, 2, tmp_path, transport) as processes:
        manifest = make_manifest(LAYOUT, deal(45, 2, 10, LAYOUT), [r.endpoint for r in processes])
        create(manifest, processes, "lease")
        publish_run(manifest, manifest.runs[0], processes, random_kv(LAYOUT, 45))
        with PageClient(manifest, "lease", timeout_s=20) as client:
            pages = client.fetch()
            next(pages)
            processes[1].kill()
            with pytest.raises(ServiceError) as caught:
                list(pages)
        assert caught.value.reason == Reason.HANDOFF_FAILED
        assert caught.value.metadata["rank"] == "1"
        # What it listened at may still be there, but nobody answers.
        error = error_of(manifest)
        assert error.reason == Reason.HANDOFF_FAILED
        assert "rank 1 cannot be reached" in error.message


def test_silent_source_times_out(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    create(manifest, ranks, "lease")
    client = PageClient(manifest, "lease", timeout_s=0.3)
    with pytest.raises(ServiceError) as caught:
        list(client.fetch())
    assert caught.value.reason == Reason.HANDOFF_FAILED
    assert "within 0.3 s" in caught.value.message


def test_cancel_from_another_thread(ranks: list[WorkerProcess], manifest: Manifest) -> None:
    create(manifest, ranks, "lease")
    client = PageClient(manifest, "lease", timeout_s=20)
    threading.Timer(0.2, client.cancel).start()
    begin = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        list(client.fetch())
    assert caught.value.reason == Reason.CANCELLED
    assert time.monotonic() - begin < 2
    with pytest.raises(ServiceError, match="cancelled"):
        list(client.fetch())


def test_an_endpoint_names_its_transport(transport: Transport, manifest: Manifest) -> None:
    assert find_transport(transport.scheme) is transport
    for endpoint in (*manifest.endpoints, transport.example):
        assert endpoint.startswith(f"{transport.scheme}:")
        assert transport_of(endpoint) is transport


def test_a_scheme_that_is_not_known_is_refused(manifest: Manifest) -> None:
    error = error_of(replace(manifest, endpoints=("carrier-pigeon:7",) * 3))
    assert error.reason == Reason.HANDOFF_FAILED
    assert "expected unix:/path" in error.message
    with pytest.raises(ServiceError, match="expected unix") as caught:
        find_transport("carrier-pigeon")
    assert caught.value.reason == Reason.CONFIG_INVALID


def test_fewer_pages_than_the_manifest_says_are_refused(
    ranks: list[WorkerProcess], manifest: Manifest
) -> None:
    for rank in ranks:
        rank.store("create_pages", manifest.prefix_id, manifest.epoch, 1)
        rank.store("grant_lease", manifest.prefix_id, "lease", 20)
    assert error_of(manifest).reason == Reason.KV_MISMATCH
