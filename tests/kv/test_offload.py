"""Offloaded working KV: the same bits, below its bound, and hidden where SPPO's rule decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import attend_causal
from prefill_service.attention_shape import PromptShape
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import KVLayout
from prefill_service.kv.offload.copy_engine import Copy, CopyEngine, HostRows, Mark, Ticket
from prefill_service.kv.offload.cuda_copies import CudaCopyEngine
from prefill_service.kv.offload.file_copies import FileCopyEngine
from prefill_service.kv.offload.working_set import (
    ChunkCosts,
    OffloadedKV,
    hidden_share,
    open_working,
)
from prefill_service.parallel.kv_buffers import KVBuffers, ResidentKV

CPU = torch.device("cpu")
LAYERS = 5
"""Those that attend."""
SHAPE = PromptShape(
    num_layers=LAYERS + 1,
    num_tokens=301,
    q_heads=2,
    kv_heads=2,
    head_dim=16,
    scale=0.5,
    dtype="float32",
    device=CPU,
)
CHUNK = 64


def chunks(shape: PromptShape) -> Iterator[tuple[int, int]]:
    for start in range(0, shape.num_tokens, CHUNK):
        yield start, min(start + CHUNK, shape.num_tokens)


def run(kv: KVBuffers, shape: PromptShape, reorder: bool = False) -> Tensor:
    """A prefill's loop: each layer's rows are made of the outputs of the layer before.

    With ``reorder``, rows before the chunk change places now and then, as clustering makes them.
    Layers are released when the next one begins, as an exchange does with rows under way.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for number, (start, end) in enumerate(chunks(shape)):
        kv.start_chunk(start, end)
        x = torch.randn(shape.kv_heads, end - start, shape.head_dim, generator=generator)
        x = x.to(shape.device, shape.torch_dtype)
        for layer in range(shape.attending_layers):
            if layer:
                kv.release(layer - 1)
            buffer = kv.acquire(layer)
            assert kv.layer(layer) is buffer
            buffer[start:end, 0] = x.transpose(0, 1)
            buffer[start:end, 1] = x.transpose(0, 1).flip(-1)
            if reorder and start and (number + layer) % 2:
                first = start // 3
                buffer[first:start] = buffer[first:start].flip(0).clone()
                kv.touch(layer, first, first + 1)
                kv.touch(layer, first, start)
            k, v = buffer[:end].permute(1, 2, 0, 3)
            x = attend_causal(x, k, v, q_offset=start, scale=0.5).out + x
        kv.release(shape.attending_layers - 1)
        outputs.append(x.cpu())
    return torch.cat(outputs, 1)


@pytest.fixture(scope="module")
def expected() -> dict[bool, Tensor]:
    return {reorder: run(ResidentKV(SHAPE), SHAPE, reorder) for reorder in (False, True)}


@pytest.mark.parametrize("share", [hidden_share, lambda _: 0.0, lambda _: 0.4, lambda _: 1.0])
@pytest.mark.parametrize("layers", [2, 2.6, 4, 7])
@pytest.mark.parametrize("reorder", [False, True])
def test_same_bits_below_the_bound(
    tmp_path: Path, expected: dict[bool, Tensor], share: object, layers: float, reorder: bool
) -> None:
    limit = int(layers * SHAPE.layer_bytes)
    kv = OffloadedKV(SHAPE, limit, FileCopyEngine(SHAPE, tmp_path).start(), share)  # type: ignore[arg-type]
    assert torch.equal(run(kv, SHAPE, reorder), expected[reorder])
    report = kv.report()
    kv.close()
    kv.close()
    assert report.high_water_bytes <= limit
    away = LAYERS * SHAPE.layer_bytes - (report.high_water_bytes - 2 * SHAPE.layer_bytes)
    assert report.offloaded_bytes == away  # every row has one backing
    assert (report.moved_bytes > 0) == (report.offloaded_bytes > 0)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_rows_return_as_they_were(tmp_path: Path) -> None:
    shape = replace(SHAPE, dtype="bfloat16")
    kv = OffloadedKV(shape, 2 * shape.layer_bytes, FileCopyEngine(shape, tmp_path).start())
    assert torch.equal(run(kv, shape, True), run(ResidentKV(shape), shape, True))
    kv.close()


def test_inference_mode_tensors_travel(tmp_path: Path, expected: dict[bool, Tensor]) -> None:
    with torch.inference_mode():
        kv = OffloadedKV(SHAPE, 3 * SHAPE.layer_bytes, FileCopyEngine(SHAPE, tmp_path).start())
        assert torch.equal(run(kv, SHAPE), expected[False])
    kv.close()


def test_what_is_chosen(tmp_path: Path) -> None:
    layout = KVLayout(
        num_layers=LAYERS + 1,
        kv_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        dtype="float32",
        page_tokens=16,
    )
    everything = LAYERS * SHAPE.layer_bytes
    budget = KVBudget(layout, 1 << 40, everything - 1, offload=True)
    assert budget.offloads(SHAPE.num_tokens)
    kv = open_working(budget, SHAPE, tmp_path)
    assert isinstance(kv, OffloadedKV)
    kv.close()
    for fits in (replace(budget, working_bytes=everything), replace(budget, offload=False)):
        assert not fits.offloads(SHAPE.num_tokens)
        assert open_working(fits, SHAPE, tmp_path) is None
    with pytest.raises(ServiceError, match=r"the limit is 99; raise engine\.kv_working_bytes"):
        open_working(replace(budget, working_bytes=99), SHAPE, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- stalls --------------------------------------------------------------------------------


@dataclass(slots=True)
class At(Ticket, Mark):
    """A point in modelled time."""

    time_s: float


class ModelledCopies(CopyEngine):
    """Copies that take their time on a clock of its own, whatever the machine does.

    16 MB/s to and from the store, a hundred times as much within the device.
    """

    host_bandwidth = 16e6
    device_bandwidth = 16e8

    def __init__(self, shape: PromptShape) -> None:
        super().__init__()
        self._shape = shape
        self._store: list[Tensor] = []
        self._now_s = 0.0
        self._copies_end_s = 0.0
        self._stalled_s = 0.0

    @override
    def start(self) -> Self:
        layers = range(self._shape.attending_layers)
        self._store = [self._shape.empty(self._shape.num_tokens) for _ in layers]
        self.host_rate.add(int(self.host_bandwidth), 1.0)
        self.device_rate.add(int(self.device_bandwidth), 1.0)
        return self

    def compute(self, seconds: float) -> None:
        """Let the computing take this long."""
        self._now_s += seconds

    @override
    def submit(self, copies: Sequence[Copy]) -> Ticket:
        self._copies_end_s = max(self._copies_end_s, self._now_s)
        for copy in copies:
            if isinstance(copy.backing, HostRows):
                at = copy.backing
                backing = self._store[at.layer][at.start : at.end]
                seconds = copy.num_bytes / self.host_bandwidth
                self.host_rate.add(copy.num_bytes, seconds)
                self.moved_bytes += copy.num_bytes
            else:
                backing = copy.backing
                seconds = copy.num_bytes / self.device_bandwidth
                self.device_rate.add(copy.num_bytes, seconds)
            target, source = (copy.rows, backing) if copy.to_device else (backing, copy.rows)
            target.copy_(source)
            self._copies_end_s += seconds
        return At(self._copies_end_s)

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, At)
        stall_s = max(0.0, ticket.time_s - self._now_s)
        self._stalled_s += stall_s
        self._now_s += stall_s

    @override
    def mark(self) -> Mark:
        return At(self._now_s)

    @override
    def seconds(self, start: Mark, end: Mark) -> float:
        assert isinstance(start, At)
        assert isinstance(end, At)
        return end.time_s - start.time_s

    @property
    @override
    def stalled_s(self) -> float:
        return self._stalled_s

    @override
    def close(self) -> None:
        self._store.clear()


SLOW = replace(SHAPE, num_layers=7, num_tokens=12 * CHUNK, head_dim=64)
"""1 KiB a row, 4 ms a chunk's layer."""


def modelled(share: Callable[[ChunkCosts], float]) -> tuple[float, float, list[int], int]:
    """Seconds stalled, seconds computed, rows offloaded after each chunk, and the high water."""
    engine = ModelledCopies(SLOW)
    kv = OffloadedKV(SLOW, 1 << 40, engine.start(), share)
    away = []
    computed = 0.0
    for number, (start, end) in enumerate(chunks(SLOW)):
        kv.start_chunk(start, end)
        away.append(kv.report().offloaded_bytes // SLOW.attending_layers // SLOW.row_bytes)
        for layer in range(SLOW.attending_layers):
            kv.acquire(layer)
            seconds = 0.006 + 0.002 * number  # attention to all before takes longer and longer
            engine.compute(seconds)
            computed += seconds
            kv.release(layer)
    report = kv.report()
    kv.close()
    return report.stalled_s, computed, away, report.high_water_bytes


def test_copies_hide_where_the_rule_decides_and_stall_where_forced() -> None:
    stalled, computed, away, high = modelled(hidden_share)
    forced, _, _, least = modelled(lambda _: 1.0)
    growth = [b - a for a, b in pairwise(away)]
    assert away[0] == 0  # nothing is known of the first chunk's time
    assert away[-1] > 2 * CHUNK
    assert sum(growth[-4:]) > 0  # later chunks take longer, and may send more away
    assert high < (SLOW.attending_layers + 2) * SLOW.layer_bytes
    assert least == 2 * SLOW.layer_bytes
    assert stalled < 0.1 * computed, (stalled, forced, computed, away)
    assert forced > 0.1 * computed
    assert stalled < 0.2 * forced


def test_the_rule() -> None:
    costs = ChunkCosts(
        compute_s=1.0,
        new_bytes=1000,
        host_bytes=0,
        kept_bytes=0,
        host_rate=500.0,
        device_rate=1e4,
    )
    assert hidden_share(costs) == pytest.approx(0.4)
    assert hidden_share(replace(costs, compute_s=10)) == 1.0
    assert hidden_share(replace(costs, compute_s=0)) == 0.0
    assert hidden_share(replace(costs, host_bytes=200)) == pytest.approx(0.2)
    assert hidden_share(replace(costs, kept_bytes=4000)) == pytest.approx(0.2)
    assert hidden_share(replace(costs, host_bytes=400, kept_bytes=4000)) == 0.0


# ---- failures ------------------------------------------------------------------------------


def test_more_than_the_disk_is_refused(tmp_path: Path) -> None:
    huge = replace(SHAPE, num_tokens=1 << 38)
    with pytest.raises(ServiceError, match=r"no space for \d+ bytes of offloaded KV in") as caught:
        FileCopyEngine(huge, tmp_path).start()
    assert caught.value.reason is Reason.KV_POOL_FULL


class Broken(FileCopyEngine):
    """A file that cannot be written or read once ``moves`` copies were."""

    def __init__(self, shape: PromptShape, folder: Path, moves: float) -> None:
        self.moves = moves
        super().__init__(shape, folder)

    def _move(self, rows: Tensor, backing: HostRows, to_device: bool) -> None:
        self.moves -= 1
        if self.moves < 0:
            raise OSError(5, "Input/output error")
        super()._move(rows, backing, to_device)


def test_a_copy_that_fails_is_told_and_interrupts_nothing(tmp_path: Path) -> None:
    """Other ranks wait for what this one sends: it goes on until they agree to stop."""
    engine = Broken(SHAPE, tmp_path, float("inf")).start()
    kv = OffloadedKV(SHAPE, 2 * SHAPE.layer_bytes, engine)
    assert kv.failure is None
    engine.moves = 3
    run(kv, SHAPE)
    assert kv.failure is not None
    assert kv.failure.reason is Reason.PREFILL_FAILED
    assert "cannot be moved: Input/output error" in kv.failure.message
    kv.close()


def test_a_file_that_cannot_be_written_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"cannot be moved: Input/output error"):
        Broken(SHAPE, tmp_path, 0).start()
    assert list(tmp_path.iterdir()) == []


def test_three_layers_at_a_time_are_a_bug(tmp_path: Path) -> None:
    kv = OffloadedKV(SHAPE, 2 * SHAPE.layer_bytes, FileCopyEngine(SHAPE, tmp_path).start())
    kv.start_chunk(0, 10)
    kv.acquire(0)
    kv.acquire(1)
    with pytest.raises(RuntimeError, match=r"layer 2 is wanted while \[0, 1\] are acquired"):
        kv.acquire(2)
    kv.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layers", [2, 4])
def test_cuda_streams(layers: int) -> None:
    shape = replace(SHAPE, dtype="bfloat16", device=torch.device("cuda"))
    engine: CopyEngine = CudaCopyEngine(shape).start()
    kv = OffloadedKV(shape, layers * shape.layer_bytes, engine)
    assert torch.equal(run(kv, shape, True), run(ResidentKV(shape), shape, True))
    report = kv.report()
    assert 0 <= report.stalled_s < 10
    assert report.high_water_bytes <= layers * shape.layer_bytes
    kv.close()
