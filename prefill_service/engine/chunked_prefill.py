"""Chunked prefill on one rank: decode, encode, prefill, seal; chunk after chunk."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.report import NEVER, RankAttention
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape
from prefill_service.engine.agreement import SyncInterval
from prefill_service.engine.frame_prefetch import FramePrefetcher
from prefill_service.engine.shard_map import held_shares, task_layout, text_layout
from prefill_service.engine.spans import LayerSpans, Stage
from prefill_service.engine.task import PrefillMethod, RankTask
from prefill_service.errors import ServiceError
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.offload.offload_report import OffloadReport
from prefill_service.kv.offload.working_set import OffloadedKV, open_working
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import LayerKV
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.registry import make_exchange
from prefill_service.parallel.load_balance import BalanceLimits
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import ChunkLayout, Share
from prefill_service.parallel.unit_attention import UnitAttention


class ChunkedPrefill(PrefillMethod, LayerKV):
    """A task that is computed chunk by chunk, exactly or sparsely, by any exchange.

    Args:
        rank_task: the task on this rank.
        layout: which rank computes which tokens.
        exchange: brings this rank's queries to the keys of all ranks.
        attention: computes what is sparse, and measures all attention.
        buffers: the KV that later chunks read, where it is offloaded.
        prefetcher: decodes this rank's frames; started by ``execute``.
    """

    def __init__(
        self,
        rank_task: RankTask,
        layout: ChunkLayout,
        exchange: Exchange,
        attention: UnitAttention,
        *,
        buffers: OffloadedKV | None,
        prefetcher: FramePrefetcher,
    ) -> None:
        self._rank_task = rank_task
        self._worker = rank_task.worker
        self._clock = rank_task.clock
        self._stats = rank_task.worker.group.comm_stats
        self._layout = layout
        self._shares = list(layout.of_rank(rank_task.worker.group.rank))
        self._exchange = exchange
        self._attention = attention
        self._buffers = buffers
        self._prefetcher = prefetcher
        self._interval = SyncInterval()
        self._last_layer = self._worker.kv_layout.num_layers - 1
        self._layer_spans = LayerSpans(
            self._clock.spans,
            self._stats,
            Stage.PREFILL,
            layers=self._worker.kv_layout.num_layers,
            chunks=len(self._shares),
        )
        self._share = Share(())  # of the chunk that is computed
        self._next_page = 0
        self._patches_done = 0
        self._tokens_done = 0

    @classmethod
    def build(cls, rank_task: RankTask) -> ChunkedPrefill:
        """Build what the task needs. All ranks of its subgroup call it.

        Raises:
            TaskAborted: on every rank, when one has no memory for its KV buffers.
        """
        worker = rank_task.worker
        task = rank_task.task
        settings = worker.sparse
        if not task.exchange.kind.sparse:
            settings = replace(settings, from_tokens=NEVER)
        layout = task_layout(task, worker.chunk_tokens, worker.kv_layout)
        units = SelectionUnits.of(task.plan.patch_ends, worker.chunk_tokens)
        shape = _prompt_shape(rank_task)
        buffers = _open_buffers(rank_task, shape)
        try:
            exchange = make_exchange(
                task.exchange.kind,
                ExchangeSetup(
                    mesh=worker.meshes[task.exchange.degree],
                    layout=layout,
                    shape=shape,
                    settings=settings,
                    units=units,
                    selects=task.whole_units,
                    buffers=buffers,
                    balance_limits=_balance_limits(rank_task),
                ),
            )
            adaptive = _adaptive_attention(rank_task, shape, settings, exchange.local_kv_heads)
            prefetcher = rank_task.make_prefetcher(list(layout.of_rank(worker.group.rank)))
        except BaseException:
            if buffers is not None:
                buffers.close()
            raise
        return cls(
            rank_task,
            layout,
            exchange,
            UnitAttention(adaptive, units),
            buffers=buffers,
            prefetcher=prefetcher,
        )

    @classmethod
    def build_text(cls, rank_task: RankTask) -> ChunkedPrefill:
        """Build what text after a prefix needs whose pages this rank's subgroup holds.

        The text is attended to exactly, as by vLLM. Its queries are few against the prefix's keys,
        so that they go round and the keys stay where they are.

        Raises:
            TaskAborted: on every rank, when one has lost its pages.
        """
        worker = rank_task.worker
        task = rank_task.task
        assert task.base is not None
        held = held_shares(task.base, task.subgroup)
        layout = text_layout(task.base, task.plan, task.subgroup.size, worker.chunk_tokens)
        settings = replace(worker.sparse, from_tokens=NEVER)
        units = SelectionUnits.of(task.plan.patch_ends, worker.chunk_tokens)
        shape = _prompt_shape(rank_task)
        exchange = make_exchange(
            task.exchange.kind,
            ExchangeSetup(
                mesh=worker.meshes[task.exchange.degree],
                layout=ChunkLayout((held, *layout.shares)),
                shape=shape,
                settings=settings,
                units=units,
            ),
        )
        try:
            _store_held(rank_task, task.base, exchange, held)
        except ServiceError as error:
            rank_task.fail_together(error)
        adaptive = _adaptive_attention(rank_task, shape, settings, None)
        return cls(
            rank_task,
            layout,
            exchange,
            UnitAttention(adaptive, units),
            buffers=None,
            prefetcher=rank_task.make_prefetcher(list(layout.of_rank(worker.group.rank))),
        )

    @override
    def execute(self) -> None:
        self._prefetcher.start()
        tokens = sum(share.num_tokens for share in self._shares)
        for chunk, share in zip(self._layout.shares, self._shares, strict=True):
            features = self._encode(share)
            start = time.perf_counter()
            if self._rank_task.preemption_point(self._interval, self._copy_failure()):
                self._clock.spans.note(Stage.PREFILL, "paused", start)
            start = time.perf_counter()
            received = self._stats.bytes_received
            self._exchange.start_chunk(chunk)
            self._attention.adaptive.stats.start_chunk()
            self._share = share
            if share.num_tokens:
                self._prefill(share, features)
            else:
                self._prefill_nothing()
            self._layer_spans.finish_chunk()
            self._tokens_done += share.num_tokens
            self._clock.finish_chunk(
                Stage.PREFILL,
                done=self._tokens_done,
                total=tokens,
                start=start,
                tokens=share.num_tokens,
                bytes_received=self._stats.bytes_received - received,
            )

    @override
    def close(self) -> None:
        self._prefetcher.close()
        self._exchange.finish()

    @override
    def attention_report(self) -> RankAttention:
        return self._attention.adaptive.stats.report()

    @override
    def offload_report(self) -> OffloadReport | None:
        return self._buffers.report() if self._buffers else None

    # ---- LayerKV ---------------------------------------------------------------------------

    @override
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._layer_spans.enter_layer(layer)
        due = self._interval.count_layer()
        # On a GPU a layer is far shorter than a second; there, once per chunk is enough. Copies can
        # fail on a CPU only, and what was computed without them is never to be sealed.
        if self._worker.model.device.type == "cpu" and (due or self._buffers):
            self._rank_task.sync_point(self._interval, self._copy_failure())
        if len(k):
            self._write_pages(layer, k, v)
        if layer < self._last_layer:
            self._exchange.store_kv(layer, k, v)
        self._worker.report_progress()

    @override
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        with self._layer_spans.time_attention():
            return self._exchange.attend_adaptive(layer, q, self._attention)

    # ---- steps -----------------------------------------------------------------------------

    def _copy_failure(self) -> ServiceError | None:
        return self._buffers.failure if self._buffers else None

    def _encode(self, share: Share) -> list[VisionFeatures]:
        """Features of a share's patches; nothing if it has none, or when the task is cancelled."""
        if not share.num_patches:
            return []
        try:
            pixels = self._prefetcher.next(self._rank_task.control.cancelled)
        except ServiceError as error:
            self._rank_task.fail_together(error)
        if pixels is None:
            return []  # cancelled; at the synchronisation point that follows, all ranks learn of it
        start = time.perf_counter()
        features = self._worker.model.encode(pixels)
        self._worker.report_progress()
        self._patches_done += share.num_patches
        self._clock.finish_chunk(
            Stage.VISION,
            done=self._patches_done,
            total=sum(share.num_patches for share in self._shares),
            start=start,
            patches=share.num_patches,
        )
        return [features]

    def _prefill(self, share: Share, features: list[VisionFeatures]) -> None:
        """Run the language model over a share's tokens and seal their pages."""
        plan = self._rank_task.task.plan
        self._worker.model.prefill(
            share.select_tokens(plan.token_ids),
            share.select_tokens(plan.position_ids),
            plan.video_token_id,
            features=features,
            kv=self,
        )
        pages = sum(self._worker.kv_layout.pages_for(p.num_tokens) for p in share.pieces)
        self._rank_task.writer.seal_pages(self._next_page, pages)
        self._next_page += pages

    @torch.inference_mode()  # as the model is: tensors made in it are changed here, too
    def _prefill_nothing(self) -> None:
        """Take part in a chunk of which this rank has no share.

        An exchange expects the same calls in the same order on every rank (``Exchange``). A model
        does not run on zero tokens, so that its calls, one pair per layer, are made here.
        """
        model = self._worker.model
        shape = model.shape

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=model.dtype, device=model.device)

        kv = empty(0, shape.kv_heads, shape.head_dim)
        q = empty(shape.q_heads, 0, shape.head_dim)
        for layer in range(shape.num_layers):
            self.store(layer, kv, kv)
            if layer < self._last_layer:
                self.attend(layer, q, model.attention_scale)

    def _write_pages(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write this rank's keys and values; each piece of a share begins a page."""
        page = self._next_page
        sizes = [piece.num_tokens for piece in self._share.pieces]
        for part_k, part_v in zip(torch.split(k, sizes), torch.split(v, sizes), strict=True):
            self._rank_task.writer.write(layer, page, part_k, part_v)
            page += self._worker.kv_layout.pages_for(len(part_k))


def _store_held(
    rank_task: RankTask, base: Manifest, exchange: Exchange, held: tuple[Share, ...]
) -> None:
    """Give an exchange the keys and values that this rank holds of a prefix.

    Raises:
        ServiceError: UNKNOWN_PREFIX.
    """
    worker = rank_task.worker
    layout = worker.kv_layout
    file = worker.store.find_pages(base.prefix_id, base.epoch)
    runs = [run for run in base.runs if run.rank == worker.spec.rank]
    exchange.start_chunk(held)
    for layer in range(layout.attending_layers):
        parts = [torch.empty(2, 0, layout.kv_heads, layout.head_dim, dtype=worker.model.dtype)]
        for run in runs:
            tokens = run.end_token - run.start_token
            pages = slice(run.first_page, run.first_page + layout.pages_for(tokens))
            # [pages, 2, page_tokens, kv_heads, head_dim] -> [2, tokens, kv_heads, head_dim]
            kv = file.pages[pages, layer].transpose(0, 1).flatten(1, 2)
            parts.append(kv[:, :tokens])
        k, v = torch.cat(parts, 1).to(worker.model.device)
        exchange.store_kv(layer, k, v)


def _prompt_shape(rank_task: RankTask) -> PromptShape:
    model = rank_task.worker.model
    tokens = rank_task.task.plan.num_tokens
    return model.shape.of_prompt(tokens, scale=model.attention_scale, device=model.device)


def _open_buffers(rank_task: RankTask, shape: PromptShape) -> OffloadedKV | None:
    """Buffers of which only a part is on the device, where all of it exceeds the budget."""
    worker = rank_task.worker
    budget = worker.kv_budget(rank_task.task.exchange)
    try:
        return open_working(budget, shape, worker.runtime_dir)
    except ServiceError as error:
        rank_task.fail_together(error)


def _balance_limits(rank_task: RankTask) -> BalanceLimits:
    engine = rank_task.worker.spec.engine
    return BalanceLimits(engine.balance_above, engine.balance_least_gflop * 1e9)


def _adaptive_attention(
    rank_task: RankTask,
    shape: PromptShape,
    settings: SparseSettings,
    local_kv_heads: slice | None,
) -> AdaptiveAttention:
    return AdaptiveAttention(
        settings,
        rank_task.task.policy,
        shape,
        rank_task.task.plan.patch_ends,
        heads=local_kv_heads,
    )
