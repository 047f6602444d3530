"""Mutated files, each of them by seed: the front end outlives all, and each has a named end."""

import asyncio
import random
from pathlib import Path

from prefill_service.video.decoder.pool import DecoderPool
from tools.fuzz_decoder import BLAMES_THE_FILE, mutate, outcome_of, small_files

ROUNDS = 24


def test_mutations_are_repeatable_and_change_something() -> None:
    data = bytes(range(256)) * 8
    made = [mutate(data, random.Random(seed)) for seed in range(50)]
    assert made == [mutate(data, random.Random(seed)) for seed in range(50)]
    assert sum(one != data for one in made) >= 45
    assert all(made)


def test_mutated_files_end_by_a_reason_or_give_frames(tmp_path: Path) -> None:
    files = small_files(tmp_path)
    assert len(files) >= 5
    pool = DecoderPool(0)

    async def run() -> set[str]:
        found = set()
        for number in range(ROUNDS):
            source = files[number % len(files)]
            path = tmp_path / f"mutated{source.suffix}"
            path.write_bytes(mutate(source.read_bytes(), random.Random(number)))
            found.add(await outcome_of(path, tmp_path / "index.npz", pool))
        return found

    outcomes = asyncio.run(run())
    assert "frames" in outcomes
    assert outcomes - {"frames"}
    assert {one.split()[0] for one in outcomes} <= {"frames", *map(str, BLAMES_THE_FILE)}
