"""The prefix cache under pressure: never above its bound, never a leased prefix, oldest first."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import KVLayout, Manifest, ShardRun
from prefill_service.scheduling.prefix_cache import Lease, PrefixCache
from prefill_service.scheduling.runner import RESTARTABLE

POOL = 1000
LAYOUT = KVLayout(num_layers=1, kv_heads=1, head_dim=4, dtype="float32", page_tokens=16)


class RecordingExecutor:
    """The prefixes that the ranks hold, least recently used first, and their leases."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.leases: dict[str, set[str]] = {}

    def grant_lease(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        self.leases.setdefault(prefix_id, set()).add(lease_id)

    def release_lease(self, prefix_id: str, lease_id: str) -> None:
        self.leases.get(prefix_id, set()).discard(lease_id)

    def drop_prefix(self, prefix_id: str) -> None:
        self.held.pop(prefix_id, None)


def manifest(prefix_id: str, epoch: int = 0) -> Manifest:
    return Manifest(
        prefix_id,
        "engine",
        epoch,
        "model",
        LAYOUT,
        1,
        (ShardRun(0, 1, 0, 0),),
        ("unix:/r",),
        "hash",
        0,
    )


class Model:
    """The prefix cache, driven at random, beside the least that must be true of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.executor = RecordingExecutor()
        self.gone: list[str] = []
        self.cache = PrefixCache(
            self.executor,  # type: ignore[arg-type]
            POOL,
            30.0,
            self.gone.append,
        )
        self.computing: set[str] = set()
        self.manifests: dict[str, Manifest] = {}
        self.leases: list[Lease] = []
        self.epoch = 0
        self.count = self.evictions = self.refusals = 0

    def leased(self) -> set[str]:
        return {lease.manifest.prefix_id for lease in self.leases}

    async def arrive(self) -> None:
        size = self.random.choice((50, 150, 300, 700, POOL, POOL + 1))
        fixed = self.leased() | self.computing
        room = POOL - sum(self.executor.held[name] for name in fixed)
        before = dict(self.executor.held)
        if size > room:
            with pytest.raises(ServiceError, match=f"needs {size} bytes of KV, the pool") as caught:
                await self.cache.make_room(size, wait_s=0)
            assert caught.value.reason is Reason.KV_POOL_FULL
            assert self.executor.held == before  # nothing is lost for what has no room anyway
            self.refusals += 1
            return
        await self.cache.make_room(size)
        lost = [name for name in before if name not in self.executor.held]
        assert not set(lost) & fixed
        # Exactly as many of the least recently used as were needed.
        candidates = [name for name in before if name not in fixed]
        assert lost == candidates[: len(lost)]
        if lost:
            assert sum(self.executor.held.values()) + before[lost[-1]] + size > POOL
        self.evictions += len(lost)
        self.count += 1
        name = f"prefix{self.count}"
        self.manifests[name] = manifest(name, self.epoch)
        self.cache.add_prefix(self.manifests[name], size)
        self.executor.held[name] = size
        self.computing.add(name)

    def finish(self) -> None:
        if self.computing:
            name = self.random.choice(sorted(self.computing))
            self.computing.remove(name)
            if self.random.random() < 0.2:
                self.cache.invalidate(self.manifests[name])
                self.leases = [x for x in self.leases if x.manifest.prefix_id != name]
            else:
                self.cache.complete_prefix(name)

    def lease(self) -> None:
        if self.executor.held:
            name = self.random.choice(sorted(self.executor.held))
            self.leases.append(self.cache.open_lease(name))
            self.executor.held[name] = self.executor.held.pop(name)  # the youngest now

    def release(self) -> None:
        if self.leases:
            lease = self.leases.pop(self.random.randrange(len(self.leases)))
            assert lease.lease_id in self.executor.leases[lease.manifest.prefix_id]
            self.cache.release_lease(lease)
            self.cache.release_lease(lease)
            assert lease.lease_id not in self.executor.leases[lease.manifest.prefix_id]

    def die(self) -> None:
        self.cache.forget_epoch(self.epoch)
        assert all(lease.lost.is_set() for lease in self.leases)
        self.epoch += 1
        self.executor.held.clear()
        self.executor.leases.clear()
        self.computing.clear()
        self.leases.clear()

    def check(self) -> None:
        cache = self.cache
        assert cache.used_bytes == sum(self.executor.held.values()) <= POOL
        fixed = self.leased() | self.computing
        assert cache.leased_bytes == sum(self.executor.held[name] for name in fixed)
        assert not any(lease.lost.is_set() for lease in self.leases)
        for lease in self.leases:
            assert lease.lease_id in self.executor.leases[lease.manifest.prefix_id]


@pytest.mark.parametrize("seed", range(20))
async def test_random_arrivals_leases_and_evictions(seed: int) -> None:
    model = Model(seed)
    for _ in range(400):
        action = model.random.choices(
            ("arrive", "finish", "lease", "release", "die"), (6, 6, 4, 4.5, 0.05)
        )[0]
        if action == "arrive":
            await model.arrive()
        else:
            getattr(model, action)()
        model.check()
    assert model.evictions > 5
    assert model.refusals > 5


async def test_a_prefix_larger_than_the_pool_says_what_to_change() -> None:
    cache = PrefixCache(
        SimpleNamespace(),  # type: ignore[arg-type]
        POOL,
        30.0,
        lambda _: None,
    )
    with pytest.raises(ServiceError) as caught:
        await cache.make_room(POOL + 1)  # at once, whatever others would release
    assert caught.value.message == (
        "the prefix needs 1001 bytes of KV, the pool has 1000; "
        "raise engine.kv_pool_bytes or look at fewer or smaller frames"
    )


async def test_what_is_being_computed_is_waited_for_however_long_it_takes() -> None:
    cache = PrefixCache(
        RecordingExecutor(),  # type: ignore[arg-type]
        POOL,
        30.0,
        lambda _: None,
    )
    cache.add_prefix(manifest("first"), POOL)
    waiting = asyncio.create_task(cache.make_room(POOL, wait_s=0.02))
    await asyncio.sleep(0.2)
    lease = cache.open_lease("first")
    cache.complete_prefix("first")
    with pytest.raises(ServiceError, match="1000 bytes of them leased"):  # now for leases only
        await waiting
    cache.release_lease(lease)
    await cache.make_room(POOL, wait_s=0.02)
    assert cache.used_bytes == 0


def test_ranks_lost_right_after_their_answer_are_no_fault_of_the_job() -> None:
    cache = PrefixCache(
        RecordingExecutor(),  # type: ignore[arg-type]
        POOL,
        30.0,
        lambda _: None,
    )
    cache.add_prefix(manifest("first"), POOL)
    cache.forget_epoch(manifest("first").epoch)
    with pytest.raises(ServiceError, match="were lost before it was kept") as caught:
        cache.complete_prefix("first")
    assert caught.value.reason in RESTARTABLE


async def test_a_prefix_is_not_computed_again_before_the_ranks_have_stopped() -> None:
    ranks = RecordingExecutor()
    cache = PrefixCache(ranks, POOL, 30.0, lambda _: None)  # type: ignore[arg-type]
    stopping = manifest("it")
    again = manifest("it")
    cache.add_prefix(stopping, 10)
    waiting = asyncio.create_task(cache.make_room(10, wait_s=0.02, prefix_id="it"))
    await cache.make_room(10, wait_s=0, prefix_id="another")
    await asyncio.sleep(0.1)
    assert not waiting.done()
    cache.invalidate(stopping)
    await waiting
    cache.add_prefix(again, 10)
    ranks.held["it"] = 10
    cache.invalidate(stopping)
    assert ranks.held == {"it": 10}
    lease = cache.open_lease("it")
    assert lease.manifest is again
    cache.invalidate(again)
    assert lease.lost.is_set()
    assert not ranks.held
