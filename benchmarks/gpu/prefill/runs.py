"""One prefill: with the product's exchange and attention, or with torch's dense attention."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.gpu.prefill.device import Device
from benchmarks.gpu.prefill.inputs import AttentionInputs
from benchmarks.gpu.prefill.model import RandomModel, Substituted, run_chunks
from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.dense import Partial, attend, merge
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.kv.manifest import KVLayout
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.models.prefill_model import LayerKV
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import ChunkLayout, deal_patches
from prefill_service.parallel.unit_attention import UnitAttention

DENSE = "dense"
MODES = (DENSE, "exact", "high", "balanced", "fast")


class DenseKernel(Protocol):
    """Dense attention over all keys, or causal over the own chunk's."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
        """Output and log-sum-exp."""


"""q [q_heads, queries, head_dim], k, v [kv_heads, keys, head_dim], causal, scale."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How prefills are computed.

    Attributes:
        chunk_tokens, sparse: the product's.
        dense_chunk_tokens: of the dense baseline, which gains from long chunks.
    """

    chunk_tokens: int
    dense_chunk_tokens: int
    sparse: SparseSettings


@dataclass(frozen=True, slots=True)
class Workload:
    """What is prefilled: a prompt by a model, where ``inputs`` attend in every layer."""

    model: RandomModel
    plan: PrefixPlan
    inputs: AttentionInputs


@dataclass(slots=True)
class Run:
    """One prefill.

    Attributes:
        seconds: wall clock.
        attention_s: of it, attention, with selection and verification.
        reports: of the layers that attend; none of the dense baseline.
        peak_bytes: of device memory, weights and inputs included.
        attended: [q_heads, tokens, head_dim] of the first layer, if asked for.
        stored: layer to its own [tokens, 2, kv_heads, head_dim], likewise.
    """

    seconds: float
    attention_s: float
    reports: list[LayerReport] = field(default_factory=list)
    peak_bytes: int | None = None
    attended: Tensor | None = None
    stored: dict[int, Tensor] = field(default_factory=dict)


class OursKV(LayerKV):
    """``engine.pipeline.ChunkedPrefill``'s keys and attention, of one rank and the gather exchange.

    Args:
        layout: of the prompt, on one rank, in chunks of ``chunk_tokens``.
        writer: takes the pages of every layer, as for a hand-off.
    """

    def __init__(
        self,
        model: RandomModel,
        plan: PrefixPlan,
        layout: ChunkLayout,
        *,
        chunk_tokens: int,
        settings: SparseSettings,
        quality: Quality,
        writer: ShardWriter | None = None,
    ) -> None:
        self._layout = layout
        self._writer = writer
        self._attending = model.shape.attending_layers
        shape = model.shape.of_prompt(
            plan.num_tokens, scale=model.attention_scale, device=model.device
        )
        self._exchange = GatherExchange(SPGroup(rank=0, size=1, data=None, control=None), shape)
        self.attention = AdaptiveAttention(
            settings, resolve_policy(quality), shape, plan.patch_ends
        )
        units = SelectionUnits.of(plan.patch_ends, chunk_tokens)
        self._unit_attention = UnitAttention(self.attention, units)
        self._chunk = -1
        self._page = 0

    @override
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer == 0:
            self._chunk += 1
            self._exchange.start_chunk(self._layout.shares[self._chunk])
            self.attention.stats.start_chunk()
        if self._writer is not None:
            self._write(self._writer, layer, k, v)
        if layer < self._attending:
            self._exchange.store_kv(layer, k, v)

    @override
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        return self._exchange.attend_adaptive(layer, q, self._unit_attention)

    def _write(self, writer: ShardWriter, layer: int, k: Tensor, v: Tensor) -> None:
        writer.write(layer, self._page, k.contiguous(), v.contiguous())
        if layer == self._attending:
            pages = -(-len(k) // PAGE_TOKENS)
            writer.seal_pages(self._page, pages)
            self._page += pages


PAGE_TOKENS = 64


class DenseKV(LayerKV):
    """All keys, attended to by a dense kernel: own chunk causally, all before without a mask."""

    def __init__(self, model: RandomModel, plan: PrefixPlan, chunks: int, kernel: DenseKernel):
        self._kernel = kernel
        self._attending = model.shape.attending_layers
        self._single = chunks == 1
        rows = (plan.num_tokens, *model.shape.row)
        self._kv = [
            torch.empty((0,) if self._single else rows, dtype=model.dtype, device=model.device)
            for _ in range(self._attending)
        ]
        self._own = self._kv[0]
        self._end = 0

    @override
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer == 0:
            self._end += len(k)
        if layer == self._attending:
            return
        self._own = torch.stack([k, v], 1)
        if not self._single:
            self._kv[layer][self._end - len(k) : self._end] = self._own

    @override
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        start = self._end - q.shape[1]
        k, v = self._own.permute(1, 2, 0, 3)
        parts = [self._kernel(q, k, v, causal=True, scale=scale)]
        if start:
            k, v = self._kv[layer][:start].permute(1, 2, 0, 3)
            parts.append(self._kernel(q, k, v, causal=False, scale=scale))
        return merge(parts).out


def torch_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
    """torch's FlashAttention-2 (on a CPU its own), as the product's exact mode calls it."""
    return attend(q, k, v, causal=causal, scale=scale)


def torch_cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
    """cuDNN's attention; key heads are repeated, which costs little and fits every version."""
    group = len(q) // len(k)
    k, v = (x.repeat_interleave(group, 0)[None] for x in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q[None].contiguous(), k, v, None, True, 0.0, causal, False, scale=scale
    )
    return Partial(out[0], lse.reshape(q.shape[:2]).float())


def dense_kernels(device: Device) -> dict[str, DenseKernel]:
    """What a dense baseline can be made of here."""
    found: dict[str, DenseKernel] = {"flash": torch_flash}
    return found | {"cudnn": torch_cudnn} if device.cuda else found


def prefill(
    device: Device,
    workload: Workload,
    *,
    mode: str,
    settings: Settings,
    kernel: DenseKernel,
    capture: bool = False,
    pages: bool = False,
) -> Run:
    """Prefill the prompt once.

    Args:
        mode: one of ``MODES``.
        kernel: of the dense baseline.
        capture: keep what ``Run`` offers.
        pages: write pages to shared memory and checksum them, as for a hand-off.
    """
    model = workload.model
    plan = workload.plan
    chunk = settings.chunk_tokens
    if mode == DENSE:
        chunk = settings.dense_chunk_tokens
        if plan.num_tokens < 1.1 * chunk:  # no second chunk for a few timestamps
            chunk *= 2
    layout = deal_patches(plan.patch_ends, 1, chunk)
    chunks = [share.contiguous for share in layout.of_rank(0)]
    features = model.features()
    device.forget()
    writer = _writer(model, plan, chunks) if pages else None
    device.wait()
    begin = time.perf_counter()
    if mode == DENSE:
        kv: OursKV | DenseKV = DenseKV(model, plan, len(chunks), kernel)
    else:
        kv = OursKV(
            model,
            plan,
            layout,
            chunk_tokens=settings.chunk_tokens,
            settings=settings.sparse,
            quality=Quality(mode),
            writer=writer,
        )
    clock = Stopwatch(device.device)
    attended: list[Tensor] | None = [] if capture else None
    stored: dict[int, list[Tensor]] | None = {} if capture else None
    run_chunks(
        model,
        plan,
        chunks,
        kv=Substituted(kv, workload.inputs, clock, attended=attended, stored=stored),
        features=features,
    )
    device.wait()
    run = Run(time.perf_counter() - begin, clock.seconds("attention"))
    run.peak_bytes = device.peak_bytes()
    if isinstance(kv, OursKV):
        run.reports = kv.attention.stats.report().layers
    if attended is not None and stored is not None:
        run.attended = torch.cat(attended, 1)
        run.stored = {layer: torch.cat(parts) for layer, parts in stored.items()}
    return run


def _writer(model: RandomModel, plan: PrefixPlan, chunks: list[tuple[int, int]]) -> ShardWriter:
    shape = model.shape
    layout = KVLayout(
        num_layers=shape.num_layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        page_tokens=PAGE_TOKENS,
    )
    pages = sum(layout.pages_for(end - start) for start, end in chunks)
    return ShardStore(layout).create_pages(plan.prefix_id, 0, pages)
