"""All steps of the benchmark, within its time: check, products, lengths, whole models, pages."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import tables
from benchmarks.gpu.prefill import check, report
from benchmarks.gpu.prefill.cells import Budget, Cell, Group, plan_cells
from benchmarks.gpu.prefill.device import Device
from benchmarks.gpu.prefill.inputs import AttentionInputs, Frames, Heads, video_attention
from benchmarks.gpu.prefill.model import RandomModel
from benchmarks.gpu.prefill.runs import (
    DENSE,
    DenseKernel,
    Settings,
    Workload,
    dense_kernels,
    prefill,
)
from benchmarks.gpu.prefill.shapes import SHAPES, TINY, PublishedModel
from prefill_service.attention.crossover import measure_crossover
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import dtype_name
from prefill_service.config import EngineConfig
from prefill_service.engine.resolve import chunk_tokens, sparse_settings
from prefill_service.models.prefix_plan import PrefixPlan

TOKENS = (32768, 65536, 131072, 262144, 524288)
WHOLE_TOKENS = 131072
"""The length at which whole models are run, to check the extrapolation."""
CHECK_TOKENS = 16384
"""From 8 K keys on kernels are tuned; that is over then, too."""


class Benchmark:
    """One run of everything; ``rows`` grows.

    Args:
        options: of the command line.
        device: to measure.
        save: called now and then, so that a run that is cut off leaves what it has.
    """

    def __init__(
        self, options: argparse.Namespace, device: Device, save: Callable[[Benchmark], None]
    ) -> None:
        self._options = options
        self.device = device
        self._save = save
        self._begin = self._started = time.monotonic()
        self.shapes = TINY if options.tiny else SHAPES
        size = 128 if options.tiny else 8192
        self.peak = device.matmul_peak(size)
        print(f"{device.name}: matrix products reach {self.peak / 1e12:.3g} TFLOP/s", flush=True)
        self.budget = Budget(options.budget, self.peak)
        engine = EngineConfig(model="random")
        chunk = options.chunk or (128 if options.tiny else chunk_tokens(engine, "cuda"))
        self.mlp_chunk = engine.mlp_chunk_tokens if options.mlp_chunk is None else options.mlp_chunk
        self.settings = Settings(chunk, options.dense_chunk, self._sparse(engine, chunk))
        self.kernel: DenseKernel = next(iter(dense_kernels(device).values()))
        self.kernel_name = ""
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._warm: set[tuple[str, str]] = set()

    def run(self) -> bool:
        """Whether the layers are right; if not, nothing is timed."""
        kernels = self._check()
        self._account()
        if not all(row["ok"] for row in self.checks if not row["mode"].startswith(DENSE)):
            return False
        if not kernels:
            return False
        self._products()
        self._choose_kernel(kernels)
        groups = plan_cells(self.shapes, self._lengths(), self._options.modes, self._options.layers)
        for group, cells in groups.items():
            what = f"{group[0].name}, {group[1]} tokens"
            if self.budget.allows(what, cells):
                self._group(group, cells)
                report.add_speedups(self.rows)
                self._save(self)
        for shape in self.shapes:
            self._whole(shape)
        self._pages()
        report.add_speedups(self.rows)
        self._save(self)
        return True

    def result(self) -> dict[str, Any]:
        """For the result file."""
        settings = tables.settings(
            gpu=self.device.name,
            cuda=torch.version.cuda,
            matmul_tflops=self.peak / 1e12,
            dense_kernel=self.kernel_name,
            chunk_tokens=self.settings.chunk_tokens,
            mlp_chunk_tokens=self.mlp_chunk,
            sparse_from_tokens=self.settings.sparse.from_tokens,
            spread=self._options.spread,
            mixed=self._options.mixed,
            skipped=self.budget.skipped,
            seconds=round(time.monotonic() - self._started, 1),
        )
        return {"settings": settings, "checks": self.checks, "rows": self.rows}

    # ---- steps -----------------------------------------------------------------------------

    def _lengths(self) -> Sequence[int]:
        return self._options.tokens or ((384, 768) if self._options.tiny else TOKENS)

    def _sparse(self, engine: EngineConfig, chunk: int) -> SparseSettings:
        """Sizes as in the product; from which length on is measured as it does, within reason."""
        if self._options.tiny:
            return SparseSettings(256, block_tokens=16, tile_tokens=32, segment_blocks=4)
        sizes = sparse_settings(engine, self._options.sparse_from)
        if self._options.sparse_from:
            return sizes
        preset = self.shapes[0]
        shape = preset.model_shape(preset.layers, dtype_name(self.device.dtype))
        found = measure_crossover(shape, sizes, chunk, self.device.device)
        used = min(found, min(self._lengths()) // 2)
        print(f"the product would attend sparsely from {found} keys on; here from {used}")
        return replace(sizes, from_tokens=used)

    def _check(self) -> dict[str, DenseKernel]:
        """One layer of every mode; the dense kernels that are right."""
        tokens = self._options.check_tokens or (400 if self._options.tiny else CHECK_TOKENS)
        settings = self.settings
        if settings.sparse.from_tokens >= tokens:
            sparse = replace(settings.sparse, from_tokens=tokens // 2)
            settings = replace(settings, sparse=sparse)
        kernels = dense_kernels(self.device)
        right = dict(kernels)
        for shape in self.shapes:
            found = check.check(
                self.device,
                shape,
                tokens,
                settings=settings,
                kernels=kernels,
                mlp_chunk_tokens=self.mlp_chunk,
            )
            self.checks += found
            for row in found:
                name = row["mode"].removeprefix(f"{DENSE} ")
                if not row["ok"]:
                    right.pop(name, None)
        cells = [[_yes(row.get(name)) for name in check.COLUMNS] for row in self.checks]
        print(f"\none layer of {tokens} video tokens against float32\n")
        print(tables.markdown(check.COLUMNS, cells), flush=True)
        return right

    def _products(self) -> None:
        """The layers' own matrix products, alone."""
        rows = min(self.settings.chunk_tokens, self.mlp_chunk or self.settings.chunk_tokens)
        print(f"\nlinear layers alone, as share of the matmul peak ({rows} rows in the MLP)")
        for shape in self.shapes:
            hidden = shape.hidden
            wide = shape.intermediate
            whole = self.settings.chunk_tokens
            heads = shape.heads * shape.head_dim
            kv_heads = shape.kv_heads * shape.head_dim
            sizes = {
                "q": (whole, hidden, heads),
                "k": (whole, hidden, kv_heads),
                "o": (whole, heads, hidden),
                "up": (rows, hidden, wide),
                "down": (rows, wide, hidden),
            }
            shares = [
                f"{name} {self.device.matmul_rate(*size) / self.peak:.2f}"
                for name, size in sizes.items()
            ]
            print(f"  {shape.name}: {', '.join(shares)}", flush=True)
        self._account()

    def _choose_kernel(self, kernels: dict[str, DenseKernel]) -> None:
        """The fastest right one, on a causal prompt of the shortest length."""
        shape = self.shapes[0]
        device = self.device
        tokens = min(self._lengths())
        q, k, v = (
            torch.randn(heads, tokens, shape.head_dim, dtype=device.dtype, device=device.device)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        scale = shape.head_dim**-0.5
        taken = {
            name: device.seconds(functools.partial(kernel, q, k, v, causal=True, scale=scale))
            for name, kernel in kernels.items()
        }
        flops = shape.attention_flops(tokens * (tokens + 1) / 2)
        self.kernel_name = min(taken, key=lambda name: taken[name])
        self.kernel = kernels[self.kernel_name]
        rates = ", ".join(f"{n} {flops / t / 1e12:.3g} TFLOP/s" for n, t in taken.items())
        print(
            f"dense attention over {tokens} tokens: {rates}; {self.kernel_name} is used", flush=True
        )
        self._account()

    def _group(self, group: Group, cells: list[Cell]) -> None:
        """All modes over the same inputs; a mode that runs out of memory is left out, and said."""
        shape, tokens = group
        plan = shape.plan(tokens)
        device = self.device
        try:
            model = RandomModel(
                shape,
                cells[0].layers,
                device.dtype,
                device=device.device,
                mlp_chunk_tokens=self.mlp_chunk,
            )
            workload = Workload(model, plan, self._inputs(shape, plan))
        except torch.OutOfMemoryError as error:
            self.budget.skipped.append(f"{shape.name}, {tokens} tokens: {_first_line(error)}")
            device.forget()
            return
        for cell in cells:
            try:
                self._cell(cell, workload)
            except torch.OutOfMemoryError as error:
                what = f"{shape.name}, {tokens} tokens, {cell.layers} layers, {cell.mode}"
                self.budget.skipped.append(f"{what}: {_first_line(error)}")
            device.forget()
        self._account()

    def _inputs(self, shape: PublishedModel, plan: PrefixPlan) -> AttentionInputs:
        return video_attention(
            Frames(plan.num_tokens, round(plan.num_tokens / len(plan.patch_ends)), shape.grid[1]),
            Heads(shape.heads, shape.kv_heads, shape.head_dim),
            dtype=self.device.dtype,
            device=self.device.device,
            spread=self._options.spread,
            mixed=self._options.mixed,
        )

    def _cell(self, cell: Cell, workload: Workload) -> None:
        """The faster of two runs where that is cheap; the first one compiles and tunes."""
        taken = []
        for _ in range(self._options.turns):
            run = prefill(
                self.device,
                workload,
                mode=cell.mode,
                settings=self.settings,
                kernel=self.kernel,
            )
            taken.append(run)
            known = (cell.shape.name, cell.mode) in self._warm
            if known and run.seconds > self._options.once_above:
                break
        self._warm.add((cell.shape.name, cell.mode))
        run = min(taken, key=lambda run: run.seconds)
        self.budget.measured(cell, run.seconds)
        row = report.make_row(cell, workload.plan.num_tokens, run, self.peak)
        self.rows.append(row)
        found = {name: row.get(name) for name in ("model", "tokens", "mode", "layers")}
        print(f"{found} {run.seconds:.3f} s, attention {run.attention_s:.3f} s", flush=True)

    def _whole(self, shape: PublishedModel) -> None:
        """All layers at one length: dense and balanced, against what was extrapolated."""
        tokens = self._options.whole_tokens or (768 if self._options.tiny else WHOLE_TOKENS)
        cells = [
            Cell(shape=shape, video_tokens=tokens, mode=mode, layers=shape.layers)
            for mode in (DENSE, "balanced")
        ]
        what = f"{shape.name}, {tokens} tokens, all {shape.layers} layers"
        if not self._options.whole or not self.budget.allows(what, cells):
            return
        before = len(self.rows)
        self._group((shape, tokens), cells)
        for row in self.rows[before:]:
            said = [
                other["prefill_s"]
                for other in self.rows[:before]
                if (other["model"], other["tokens"], other["mode"])
                == (row["model"], row["tokens"], row["mode"])
            ]
            if said:
                share = said[0] / row["prefill_s"]
                print(
                    f"{what}, {row['mode']}: extrapolated {share:.3f} of what it took", flush=True
                )

    def _pages(self) -> None:
        """What writing and checksumming pages for a hand-off adds, at the shortest length."""
        shape = self.shapes[0]
        tokens = min(self._lengths())
        cell = Cell(
            shape=shape,
            video_tokens=tokens,
            mode="exact",
            layers=min(self._options.layers, shape.layers),
        )
        if not self.budget.allows(f"{shape.name}, {tokens} tokens, with pages", [cell, cell]):
            return
        plan = shape.plan(tokens)
        device = self.device
        model = RandomModel(
            shape, cell.layers, device.dtype, device=device.device, mlp_chunk_tokens=self.mlp_chunk
        )
        workload = Workload(model, plan, self._inputs(shape, plan))
        taken = [
            prefill(
                device,
                workload,
                mode="exact",
                settings=self.settings,
                kernel=self.kernel,
                pages=pages,
            )
            for pages in (False, True)
        ]
        layers = cell.layers
        moved = plan.num_tokens * layers * 2 * shape.kv_heads * shape.head_dim
        moved *= device.dtype.itemsize
        extra = taken[1].seconds - taken[0].seconds
        print(
            f"pages for a hand-off ({plan.num_tokens} tokens, {layers} layers, "
            f"{moved / 1e6:.0f} MB) add {extra:.3f} s to {taken[0].seconds:.3f} s, which is "
            f"{moved / max(extra, 1e-9) / 1e9:.2f} GB/s"
        )
        self._account()

    def _account(self) -> None:
        self.budget.spend(time.monotonic() - self._begin)
        self._begin = time.monotonic()


def _yes(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.2g}" if isinstance(value, float) else value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
