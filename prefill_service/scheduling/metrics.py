"""What the service counts, for Prometheus (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.scheduling.attention_summary import AttentionMeasures, AttentionSummary

_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_DENSITY = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 1)
_KEPT = (
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.925,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
    0.995,
    1,
)
_ERROR = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class _Namespace:
    """Makes metrics named ``prefill_...`` in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prefill_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"prefill_{name}", text, labels, registry=self._registry)

    def histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"prefill_{name}", text, labels, registry=self._registry, buckets=buckets)


class _PrefillMetrics:
    """Time, tokens and traffic of finished prefills."""

    def __init__(self, make: _Namespace) -> None:
        self._seconds = make.histogram("seconds", "Wall clock of a prefill.", _BUCKETS_S, "quality")
        self._tokens = make.counter("tokens", "Tokens prefilled.", "quality")
        self._on_ranks = make.counter(
            "on_ranks", "Prefills, by the number of their ranks.", "ranks"
        )
        self._paused = make.counter(
            "paused_seconds", "Seconds that prefills were paused for others."
        )
        self._received = make.counter("received_bytes", "Bytes ranks received from other ranks.")
        self._offloaded = make.counter(
            "offload_moved_bytes", "Bytes of offloaded KV moved to the ranks and back."
        )
        self._stalled = make.counter(
            "offload_stalled_seconds", "Seconds of the slowest rank waiting for offloaded KV."
        )
        self._stages = make.counter(
            "stage_seconds", "Seconds of each prefill's slowest rank, by stage.", "stage"
        )

    def record_prefill(
        self, tokens: int, outcome: PrefillOutcome, *, quality: str, ranks: int
    ) -> None:
        self._seconds.labels(quality).observe(outcome.seconds)
        self._tokens.labels(quality).inc(tokens)
        self._on_ranks.labels(ranks).inc()
        self._paused.inc(outcome.paused_s)
        self._received.inc(outcome.bytes_received)
        self._offloaded.inc(sum(rank.moved_bytes for rank in outcome.offloaded))
        self._stalled.inc(max((rank.stalled_s for rank in outcome.offloaded), default=0.0))
        for stage, seconds in outcome.stage_seconds.items():
            self._stages.labels(stage).inc(seconds)


class _AttentionMetrics:
    """What sparse attention selected, and what its verification measured."""

    def __init__(self, make: _Namespace) -> None:
        self._density = make.histogram(
            "density", "Attention density of a job.", _DENSITY, "quality"
        )
        self._kept = make.histogram(
            "kept_mass", "Measured kept mass of a job.", _KEPT, "quality", "statistic"
        )
        self._error = make.histogram(
            "output_error",
            "Measured relative output error of a job.",
            _ERROR,
            "quality",
            "statistic",
        )
        self._tiles = make.counter("tiles", "(KV head, query tile) pairs computed.")
        self._redone = make.counter("tiles_redone", "Of them, again with a smaller epsilon.")
        self._dense = make.counter("tiles_dense", "Of them, densely in the end.")
        self._floor_missed = make.counter("floor_missed", "Jobs below their floor of kept mass.")
        self._attention = make.counter(
            "attention_seconds", "Seconds of the slowest rank, summed over layers.", "phase"
        )

    def record_attention(self, quality: str, attention: AttentionSummary) -> None:
        total = attention.total
        self._density.labels(quality).observe(total.density)
        if total.sampled_rows:
            for statistic, value in _kept_mass(total).items():
                self._kept.labels(quality, statistic).observe(value)
            for statistic, value in _output_error(total).items():
                self._error.labels(quality, statistic).observe(value)
        self._tiles.inc(total.tiles)
        self._redone.inc(total.tiles_redone)
        self._dense.inc(total.tiles_dense)
        self._floor_missed.inc(not attention.floor_met)
        for phase in ("select", "attend", "certify"):
            self._attention.labels(phase).inc(getattr(total, f"{phase}_s"))


class _LastJob:
    """Gauges of the job that ended last: its attention layer by layer, and its imbalance."""

    def __init__(self, make: _Namespace) -> None:
        self._density = make.gauge("layer_density", "Attention density, last job.", "layer")
        self._kept = make.gauge(
            "layer_kept_mass", "Measured kept mass, last job.", "layer", "statistic"
        )
        self._error = make.gauge(
            "layer_output_error", "Measured relative output error, last job.", "layer", "statistic"
        )
        self._imbalance = make.gauge(
            "rank_imbalance", "Keys attended by the busiest rank over the mean, last job."
        )
        self._imbalance_before = make.gauge(
            "rank_imbalance_before", "The same, had no rank attended to others' blocks."
        )

    def set(self, attention: AttentionSummary) -> None:
        self._imbalance.set(attention.imbalance)
        self._imbalance_before.set(attention.imbalance_before)
        for gauge in (self._density, self._kept, self._error):
            gauge.clear()
        for layer in attention.layers:
            self._density.labels(layer.layer).set(layer.measures.density)
            if layer.measures.sampled_rows:
                for statistic, value in _kept_mass(layer.measures).items():
                    self._kept.labels(layer.layer, statistic).set(value)
                for statistic, value in _output_error(layer.measures).items():
                    self._error.labels(layer.layer, statistic).set(value)


class _AnswerMetrics:
    """Completed answers, and what was handed over for them."""

    def __init__(self, make: _Namespace) -> None:
        self._answers = make.counter("answers", "Answers completed.", "finish_reason")
        self._tokens = make.counter("answer_tokens", "Tokens of completed answers.")
        self._first_token = make.histogram(
            "first_token_seconds", "From the call to the answer's first token.", _BUCKETS_S
        )
        self._handoff_bytes = make.counter("handoff_bytes", "Bytes of KV moved to vLLM.")

    def record_answer(
        self, finish_reason: str, *, tokens: int, first_token_s: float, handoff_bytes: int
    ) -> None:
        self._answers.labels(finish_reason).inc()
        self._tokens.inc(tokens)
        self._first_token.observe(first_token_s)
        self._handoff_bytes.inc(handoff_bytes)


class Metrics:
    """The Prometheus metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        make = _Namespace(self.registry)
        self._jobs_ended = make.counter("jobs_ended", "Jobs that have ended, by state.", "state")
        self._prefills = _PrefillMetrics(make)
        self._attention = _AttentionMetrics(make)
        self._last_job = _LastJob(make)
        self._calls = make.counter("calls", "Calls of the API that have ended.", "method", "code")
        self.uploaded_bytes = make.counter("uploaded_bytes", "Bytes of video received.")
        self._answers = _AnswerMetrics(make)

    def watch_live(
        self,
        jobs: Callable[[], Mapping[str, int]],
        queue_depth: Callable[[], int],
        kv_bytes: Callable[[], int],
    ) -> None:
        """Read these at each scrape: jobs by state, jobs waiting, bytes of resident prefixes."""
        self.registry.register(_LiveCollector(jobs, queue_depth, kv_bytes))

    def record_job_end(self, state: str) -> None:
        """Count a job that ended in a state."""
        self._jobs_ended.labels(state).inc()

    def record_prefill(
        self,
        tokens: int,
        outcome: PrefillOutcome,
        attention: AttentionSummary | None,
        *,
        method: str = "",
        ranks: int = 1,
    ) -> None:
        """Count a finished prefill; one by a baseline's ``method`` has no attention summary."""
        quality = method if attention is None else str(attention.policy.quality)
        self._prefills.record_prefill(tokens, outcome, quality=quality, ranks=ranks)
        if attention is not None:
            self._attention.record_attention(quality, attention)
            self._last_job.set(attention)

    def record_call(self, method: str, code: str) -> None:
        """Count a call of the API that has ended."""
        self._calls.labels(method, code).inc()

    def record_answer(
        self, finish_reason: str, *, tokens: int, first_token_s: float, handoff_bytes: int
    ) -> None:
        """Count a completed answer."""
        self._answers.record_answer(
            finish_reason,
            tokens=tokens,
            first_token_s=first_token_s,
            handoff_bytes=handoff_bytes,
        )


class _LiveCollector(Collector):
    """Gauges that are read at each scrape instead of being kept up to date."""

    def __init__(
        self,
        jobs: Callable[[], Mapping[str, int]],
        queue_depth: Callable[[], int],
        kv_bytes: Callable[[], int],
    ) -> None:
        self._jobs = jobs
        self._queue_depth = queue_depth
        self._kv_bytes = kv_bytes

    def describe(self) -> Iterator[Metric]:
        """The families, without asking for values."""
        yield GaugeMetricFamily("prefill_jobs", "Jobs listed, by state.", labels=["state"])
        yield GaugeMetricFamily("prefill_queue_depth", "Jobs waiting for the ranks.")
        yield GaugeMetricFamily("prefill_kv_bytes", "KV of resident prefixes, over all ranks.")

    def collect(self) -> Iterator[Metric]:
        """The families with their values."""
        jobs, depth, kv_bytes = self.describe()
        for state, count in self._jobs().items():
            jobs.add_sample(jobs.name, {"state": state}, count)
        depth.add_sample(depth.name, {}, self._queue_depth())
        kv_bytes.add_sample(kv_bytes.name, {}, self._kv_bytes())
        yield from (jobs, depth, kv_bytes)


def _kept_mass(measures: AttentionMeasures) -> dict[str, float]:
    return {
        "mean": measures.kept_mass_mean,
        "p5": measures.kept_mass_p5,
        "min": measures.kept_mass_min,
    }


def _output_error(measures: AttentionMeasures) -> dict[str, float]:
    return {"mean": measures.output_error_mean, "p95": measures.output_error_p95}
