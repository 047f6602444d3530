"""The Unix transport: its shared memory and its socket; and what a rank's writer refuses."""

from __future__ import annotations

import mmap
import os
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport.sockets import LineReader, encode_line
from prefill_service.kv.transport.unix_server import UnixPageServer
from prefill_service.kv.vllm_connector.page_client import PageClient
from tests.kv.rank_process import EPOCH, LAYOUT, deal, make_manifest, random_kv


def test_dropped_prefix_is_freed_once_nobody_maps_it(tmp_path: Path) -> None:
    layout = replace(LAYOUT, page_tokens=1024)  # 256 KiB a page
    store = ShardStore(layout, EPOCH)
    server = UnixPageServer(store, tmp_path / "r.sock")
    server.start()
    kv = random_kv(layout, 64 * 1024)
    manifest = make_manifest(layout, deal(64 * 1024, 1, 64 * 1024, layout), [server.endpoint])
    before = _shared_memory()
    publish_but_one(store, manifest, kv)
    size = 64 * layout.page_bytes
    assert [file.num_bytes for file in store._files.values()] == [size]
    client = PageClient(manifest, "lease", timeout_s=20)
    pages = client.fetch()
    next(pages)  # mapped now; the last page is yet to come, so that the client asks for more
    store.drop_prefix("prefix")
    assert not store._files
    with pytest.raises(ServiceError) as caught:
        list(pages)
    assert caught.value.reason == Reason.UNKNOWN_PREFIX
    client.cancel()
    deadline = time.monotonic() + 5
    while _shared_memory() - before > size // 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _shared_memory() - before < size // 8
    server.close()


def publish_but_one(store: ShardStore, manifest: Manifest, kv: torch.Tensor) -> None:
    """All pages written, all but the last sealed."""
    (run,) = manifest.runs
    pages = manifest.layout.pages_for(run.end_token)
    writer = store.create_pages(manifest.prefix_id, manifest.epoch, pages)
    store.grant_lease(manifest.prefix_id, "lease", 30)
    for layer in range(manifest.layout.num_layers):
        writer.write(layer, 0, kv[layer, 0], kv[layer, 1])
    writer.seal_pages(0, pages - 1)


def _shared_memory() -> int:
    """Bytes of shared memory that this process has mapped and touched."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssShmem")]
    return int(line.split()[1]) * 1024


def test_a_reader_cannot_change_the_pages(tmp_path: Path) -> None:
    store = ShardStore(LAYOUT, EPOCH)
    server = UnixPageServer(store, tmp_path / "r.sock")
    server.start()
    store.create_pages("prefix", EPOCH, 2)
    store.grant_lease("prefix", "lease", 30)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "r.sock"))
        reader = LineReader(connection)
        message = {"op": "open", "prefix_id": "prefix", "generation": EPOCH}
        connection.sendall(encode_line({**message, "lease_id": "lease"}))
        answer = reader.read()
        assert answer == {"ok": True, "segment_bytes": 2 * LAYOUT.page_bytes}
        (fd,) = reader.fds
        with pytest.raises(PermissionError):
            mmap.mmap(fd, LAYOUT.page_bytes)  # writable
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        reader.close()
    server.close()


def test_socket_is_private_replaces_a_stale_one_and_goes_on_close(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = UnixPageServer(ShardStore(LAYOUT), path)
    server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close()
    assert not path.exists()


def test_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    path.write_text("precious")
    with pytest.raises(ServiceError) as caught:
        UnixPageServer(ShardStore(LAYOUT), path).start()
    assert caught.value.reason == Reason.CONFIG_INVALID
    assert path.read_text() == "precious"


def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="at most 107"):
        UnixPageServer(ShardStore(LAYOUT), tmp_path / ("x" * 120)).start()


@pytest.mark.parametrize(
    "line", [b"{}\n", b"nonsense\n", b'{"op": "pages", "first": 0, "count": 1}\n', b"[]\n"]
)
def test_malformed_message_is_refused(tmp_path: Path, line: bytes) -> None:
    server = UnixPageServer(ShardStore(LAYOUT), tmp_path / "r.sock")
    server.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "r.sock"))
        connection.sendall(line)
        answer = LineReader(connection).read()
    assert answer is not None
    assert answer["reason"] == "INVALID_REQUEST"
    server.close()


def test_writer_refuses_what_does_not_fit() -> None:
    writer = ShardStore(LAYOUT).create_pages("prefix", 0, 3)
    good = torch.zeros(5, 2, 8)
    writer.write(0, 0, good, good)
    with pytest.raises(ServiceError, match=r"\(5, 2, 7\)"):
        writer.write(0, 0, good[..., :7], good)
    with pytest.raises(ServiceError, match="float64"):
        writer.write(0, 0, good, good.double())
    with pytest.raises(ServiceError, match="it has 3 pages"):
        writer.write(0, 2, good, good)
    writer.seal_pages(0, 2)
    assert not writer.complete
    with pytest.raises(ServiceError, match="2 of these sealed"):
        writer.write(1, 0, good, good)
    writer.fail(ServiceError(Reason.CANCELLED, "job cancelled"))
    with pytest.raises(ServiceError, match="job cancelled"):
        writer.seal_pages(2, 1)


def test_pages_larger_than_memory_is_refused() -> None:
    with pytest.raises(ServiceError) as caught:
        ShardStore(LAYOUT).create_pages("prefix", 0, 1 << 50)
    assert caught.value.reason == Reason.KV_POOL_FULL
