"""The chunk pipeline on one rank: decode, encode, prefill, seal; chunk after chunk."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.report import NEVER, RankAttention
from prefill_service.engine.agreement import SyncInterval
from prefill_service.engine.frame_prefetch import FramePrefetcher
from prefill_service.engine.messages import PrefillTask, Progress, Stage
from prefill_service.engine.resolve import is_sparse
from prefill_service.engine.shard_map import layout_of
from prefill_service.engine.spans import LayerSpans
from prefill_service.engine.task import (
    StageClock,
    TaskControl,
    WorkerContext,
    between_chunks,
    checkpoint,
)
from prefill_service.errors import ServiceError
from prefill_service.kv.offload.shape import OffloadReport, OffloadShape
from prefill_service.kv.offload.working_set import OffloadedKV, open_working
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.models.families.base import VisionFeatures
from prefill_service.parallel.attention_shape import AttentionShape
from prefill_service.parallel.exchanges.base import ExchangeSetup
from prefill_service.parallel.exchanges.registry import ExchangeChoice, make_exchange
from prefill_service.parallel.load_balance import Balancing
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import Share
from prefill_service.parallel.unit_attention import UnitAttention


class ChunkedPrefill:
    """One task in progress; also the model's ``LayerKV``."""

    def __init__(
        self,
        rank: WorkerContext,
        task: PrefillTask,
        writer: ShardWriter,
        control: TaskControl,
    ) -> None:
        self._rank = rank
        self._plan = task.plan
        self._writer = writer
        self._control, self._cadence = control, SyncInterval()
        group, layout, model = rank.group, rank.kv_layout, rank.model
        self.clock = StageClock(
            lambda stage, done, total, seconds: rank.send(
                Progress(task.job_id, rank.number, stage, done, total, seconds)
            )
        )
        sparse, ends = rank.sparse, task.plan.patch_ends
        if not task.exchange.kind.sparse:
            sparse = replace(sparse, from_tokens=NEVER)
        self._chunks = layout_of(task, rank.chunk_tokens, layout)
        self._shares = list(self._chunks.of_rank(group.rank))
        self._last_layer = layout.num_layers - 1
        self._layer_spans = LayerSpans(
            self.clock.spans, group.meter, Stage.PREFILL, layout.num_layers, len(self._shares)
        )
        shape = AttentionShape(
            self._last_layer,
            task.plan.num_tokens,
            model.num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            model.attention_scale,
            model.dtype,
            model.device,
        )
        self._working = self._open_working(task.exchange, shape)
        units = SelectionUnits.of(ends, rank.chunk_tokens)
        self._exchange = make_exchange(
            task.exchange.kind,
            ExchangeSetup(
                mesh=rank.meshes[task.exchange.degree],
                layout=self._chunks,
                shape=shape,
                settings=sparse,
                units=units,
                selects=is_sparse(shape.num_tokens, task.exchange, task.policy, sparse.from_tokens),
                buffers=self._working,
                balancing=Balancing(rank.balance_above, rank.balance_least_gflop * 1e9),
            ),
        )
        self.attention = AdaptiveAttention(
            sparse,
            task.policy,
            self._last_layer,
            layout.num_kv_heads,
            layout.head_dim,
            model.dtype,
            model.device,
            ends,
            self._exchange.local_kv_heads,
        )
        self._unit_attention = UnitAttention(self.attention, units)
        self._share = Share(())
        self._page = 0  # next free page of this rank
        self._patches_done = self._tokens_done = 0
        preprocess = model.preprocessor(task.plan)
        self._feeder = FramePrefetcher(
            partial(rank.open_frames, task),
            preprocess,
            task.plan.frame_indices,
            preprocess.frames_per_patch,
            self._shares,
            self._on_frames,
            self.clock.spans,
        )

    def execute(self) -> None:
        """All chunks, in order."""
        tokens, meter = sum(s.num_tokens for s in self._shares), self._rank.group.meter
        for chunk, share in zip(self._chunks.shares, self._shares, strict=True):
            features = self._encode(share)
            start = time.perf_counter()
            failure = self._copy_failure()
            if between_chunks(self._rank, self._control, self._cadence, failure):
                self.clock.spans.note(Stage.PREFILL, "paused", start)
            start, received = time.perf_counter(), meter.bytes_received
            self._exchange.start_chunk(chunk)
            self.attention.start_chunk()
            self._share = share
            if share.num_tokens:
                self._prefill(share, features)
            else:
                self._stand_by()
            self._layer_spans.leave()
            self._tokens_done += share.num_tokens
            self.clock.add(
                Stage.PREFILL, self._tokens_done, tokens, start,
                tokens=share.num_tokens, bytes_received=meter.bytes_received - received,
            )  # fmt: skip

    def close(self) -> None:
        """Stop decoding, and let what the exchange still has under way arrive."""
        self._feeder.close()
        self._exchange.finish()

    def report(self) -> RankAttention:
        """See ``TaskRun``."""
        return self.attention.report()

    def offloaded(self) -> OffloadReport | None:
        """See ``TaskRun``."""
        return self._working.report() if self._working else None

    # ---- LayerKV ---------------------------------------------------------------------------

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """This rank's keys and values of one layer: to its pages, and to the other ranks."""
        self._layer_spans.enter(layer)
        due = self._cadence.due()
        # On a GPU a layer is far shorter than a second; there, once per chunk is enough. Copies can
        # fail on a CPU only, and what was computed without them is never to be sealed.
        if self._rank.model.device.type == "cpu" and (due or self._working):
            self._checkpoint(self._copy_failure())
        if len(k):
            self._write(layer, k, v)
        if layer < self._last_layer:
            self._exchange.store_kv(layer, k, v)
        self._rank.tick()

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attention of this rank's queries over all tokens before them."""
        with self._layer_spans.attending():
            return self._exchange.attend_adaptive(layer, q, self._unit_attention)

    # ---- steps -----------------------------------------------------------------------------

    def _open_working(self, exchange: ExchangeChoice, shape: AttentionShape) -> OffloadedKV | None:
        """Where the keys go that exceed the bound; nothing if none do."""
        sizes = OffloadShape(
            shape.num_layers, shape.num_tokens, shape.kv_heads, shape.head_dim, shape.dtype,
            shape.device,
        )  # fmt: skip
        try:
            return open_working(self._rank.budget(exchange), sizes, self._rank.runtime_dir)
        except ServiceError as error:
            self._checkpoint(error)  # the others' first one, wherever they get to it
            raise  # not reached: a checkpoint with an error raises on every rank

    def _copy_failure(self) -> ServiceError | None:
        return self._working.failure if self._working else None

    def _encode(self, share: Share) -> list[VisionFeatures]:
        if not share.num_patches:
            return []
        try:
            pixels = self._feeder.next(self._control.cancelled)
        except ServiceError as error:
            self._checkpoint(error)
            raise  # not reached: a checkpoint with an error raises on every rank
        if pixels is None:
            return []  # cancelled; the checkpoint that follows tells everybody
        start = time.perf_counter()
        features = self._rank.model.encode(pixels)
        self._rank.tick()
        self._patches_done += share.num_patches
        patches = sum(s.num_patches for s in self._shares)
        self.clock.add(Stage.VISION, self._patches_done, patches, start, patches=share.num_patches)
        return [features]

    def _prefill(self, share: Share, features: list[VisionFeatures]) -> None:
        self._rank.model.prefill(
            share.take(self._plan.token_ids),
            share.take(self._plan.position_ids),
            self._plan.video_token_id,
            features=features,
            kv=self,
        )
        pages = sum(self._rank.kv_layout.pages_for(p.num_tokens) for p in share.pieces)
        self._writer.seal_pages(self._page, pages)
        self._page += pages

    @torch.inference_mode()  # as the model is: what was made in it is changed here, too
    def _stand_by(self) -> None:
        """A rank without a share in this chunk still takes part in the others' exchanges."""
        layout, model = self._rank.kv_layout, self._rank.model

        def nothing(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=model.dtype, device=model.device)

        none = nothing(0, layout.num_kv_heads, layout.head_dim)
        for layer in range(layout.num_layers):
            self.store(layer, none, none)
            if layer < self._last_layer:
                none_asked = nothing(model.num_heads, 0, layout.head_dim)
                self.attend(layer, none_asked, model.attention_scale)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """This rank's keys and values to its pages; each piece of a share begins a page."""
        page, sizes = self._page, [piece.num_tokens for piece in self._share.pieces]
        for part_k, part_v in zip(torch.split(k, sizes), torch.split(v, sizes), strict=True):
            self._writer.write(layer, page, part_k, part_v)
            page += self._rank.kv_layout.pages_for(len(part_k))

    def _checkpoint(self, error: ServiceError | None = None) -> None:
        checkpoint(self._rank, self._control, self._cadence, error)

    def _on_frames(self, done: int, total: int, seconds: float) -> None:
        self._rank.tick()
        self.clock.set(Stage.DECODE, done, total, seconds)
