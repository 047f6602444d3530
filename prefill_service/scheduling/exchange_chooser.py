"""Which exchange computes a prefix, where the configuration leaves it open.

A cost model of this machine, from the ranks' probe at start and refined by every finished prefill,
costs the exchanges for a prefix's length (docs/cost_model.md). All are exact. Attention is dense
under an exchange that is not ``sparse`` in the catalogue, and such a one is chosen only where
computing all of it is faster still.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention_shape import BLOCK_TOKENS
from prefill_service.cost_model.cost import ASSUMED, CostModel
from prefill_service.cost_model.fitting import Observation, fit
from prefill_service.cost_model.history import CostHistory
from prefill_service.cost_model.request import SearchRequest
from prefill_service.cost_model.search import search_candidates
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.work import prefill_work
from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.shard_map import token_layout
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.errors import ServiceError
from prefill_service.models.model_shape import ModelShape
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.chunking import chunking_of, deal_tokens
from prefill_service.parallel.exchanges.catalog import EXCHANGES, GATHER
from prefill_service.parallel.exchanges.cost_terms import TrafficOptions
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.scheduling.placement import assumed_seconds

logger = logging.getLogger(__name__)

CONSIDERED = tuple(exchange for exchange in EXCHANGES if exchange.predictable)


class ExchangeChooser:
    """Chooses an exchange for each prefix, and refines its cost model with every finished prefill.

    Args:
        shape: of the model.
        chunk_tokens: per chunk and rank, as the ranks have it.
        kv_bytes: for K, V and buffers on each rank.
        observed: returns what the ranks' probe measured; called once they are up.
        block_tokens: keys of a block of sparse attention.
    """

    def __init__(
        self,
        shape: ModelShape,
        chunk_tokens: int,
        kv_bytes: int,
        observed: Callable[[], Sequence[Observation]],
        *,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self._shape = shape
        self._chunk_tokens = chunk_tokens
        self._kv_bytes = kv_bytes
        self._observed = observed
        self._block_tokens = block_tokens
        self._history: CostHistory | None = None
        self._density: dict[str, float] = {}
        self._seconds: dict[tuple[int, int], float] = {}

    @property
    def model(self) -> CostModel:
        """The cost model, with all prefills so far."""
        return self._cost_history().model

    def choose(self, plan: PrefixPlan, policy: AttentionPolicy, ranks: int) -> ExchangeChoice:
        """The exchange for a prefix on so many ranks; ``gather`` where none fits, which says so."""
        request = SearchRequest(
            shape=self._shape,
            tokens=plan.num_tokens,
            max_ranks=ranks,
            min_ranks=ranks,
            kv_memory_bytes=self._kv_bytes,
            density=self._density.get(policy.attention_key, 1.0),
            chunk_tokens=(self._chunk_tokens,),
            exchanges=CONSIDERED,
            block_tokens=self._block_tokens,
        )
        try:
            found = search_candidates(request, self.model)
        except ServiceError as error:
            logger.info("gather for %d tokens: %s", plan.num_tokens, error)
            return ExchangeChoice()
        strategy = found.chosen.strategy
        logger.info("%s for %d tokens: %s", strategy.label, plan.num_tokens, found.reason)
        return ExchangeChoice(strategy.exchange, strategy.ulysses)

    def predict_seconds(self, tokens: int, ranks: int) -> float:
        """Predict the seconds of a prefix of whole chunks by ``gather`` with dense attention.

        It is for comparing numbers of ranks (``placement``). Before anything is measured it is
        ``assumed_seconds``.
        """
        if self._history is None and not self._observed():
            return assumed_seconds(tokens, ranks)
        chunks = -(-tokens // self._chunk_tokens)
        if (chunks, ranks) not in self._seconds:
            whole = deal_tokens(chunks * self._chunk_tokens, ranks, self._chunk_tokens)
            work = prefill_work(Strategy(GATHER, ranks), self._shape, whole)
            self._seconds[chunks, ranks] = self.model.prefill_seconds(work)
        return self._seconds[chunks, ranks]

    def learn(self, task: PrefillTask, outcome: PrefillOutcome) -> None:
        """Add a finished prefill: the seconds of its stage without decoding and vision tower."""
        seconds = outcome.stage_seconds.get("prefill", 0.0)
        if seconds <= 0:
            return
        choice = task.exchange
        ranks = task.subgroup.size
        density = outcome.attention.density
        if choice.kind.sparse:
            # A density of 0 cannot be: the queries' own tiles are always attended.
            self._density[task.policy.attention_key] = density = min(1.0, max(density, 1e-3))
        layout = token_layout(
            task.plan,
            ranks,
            self._chunk_tokens,
            exchange=choice,
            whole_units=task.whole_units,
        )
        chunking = chunking_of([[share.ranges for share in chunk] for chunk in layout.shares])
        strategy = Strategy(choice.kind, ranks, choice.degree).with_density(density)
        options = TrafficOptions(block_tokens=self._block_tokens)
        work = prefill_work(strategy, self._shape, chunking, density=density, options=options)
        model = self._cost_history().add_job(work, seconds)
        self._seconds.clear()
        logger.info("cost model: %s", model)

    def _cost_history(self) -> CostHistory:
        if self._history is None:
            observed = list(self._observed())
            probed = fit(observed, ASSUMED, "probe of the ranks") if observed else ASSUMED
            self._history = CostHistory(probed)
        return self._history
