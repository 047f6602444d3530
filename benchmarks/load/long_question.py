"""Short questions beside a long one: what each waits, over what it waits on an idle service.

    python -m benchmarks.load.long_question
    python -m benchmarks.load.long_question --tokens 5000 --ways ranks vllm --limit-s 60

One client asks short questions about a video, one after the other: alone, then while another
client's question of thousands of tokens is answered, to its end or for a while. Three ways: the
ranks prefill the long question's text; vLLM does, at the service's pace; vLLM does by its own
scheduler. All ratios are within one run of one service. The exit status is 1 if a short question
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefill_client import Video
from prefill_client.aio import AsyncClient
from transformers import AutoTokenizer

from benchmarks import tables
from benchmarks.load.traffic import Film, make_films
from benchmarks.processes import end_on_sigterm
from tools.service_process import ServiceProcess

ROOT = Path(__file__).resolve().parents[2]
WAYS = {
    "ranks": (),
    "vllm": ("--engine-text-from-tokens", "0"),
    "vllm-own": ("--engine-text-from-tokens", "0", "--vllm-prefill-share", "0"),
}
"""Arguments of the service for each way."""

PATCHES = 64
MAX_TOKENS = 16
IDLE_QUESTIONS = 20
WORDS = "the dog ran to the red house and then "
START_S = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a short question failed."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # this process asks; it computes nothing
    settings = tables.settings(
        patches=PATCHES, max_tokens=MAX_TOKENS, limit_s=options.limit_s, ways=WAYS
    )
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        with tempfile.TemporaryDirectory(prefix="long-question-") as name:
            rows += asyncio.run(_measure(way, options, Path(name)))
        tables.write(options.out, {"settings": settings, "rows": rows})
    print(table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios of each way and length."""
    header = ("way", "long, tokens", "short p50", "short p95", "short ones beside", "long done")
    return tables.markdown(
        header,
        [
            [
                row["way"],
                row["tokens"],
                f"{row['p50_ratio']:.2f}",
                f"{row['p95_ratio']:.2f}",
                row["beside"],
                "no" if row["long_s"] is None else f"{row['long_s']:.0f} s",
            ]
            for row in rows
        ],
    )


async def _measure(way: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One service; a row for each length."""
    (folder / "videos").mkdir()
    (film,) = make_films((PATCHES,), folder / "videos", options.seed, 192)
    arguments = ["--model", str(options.checkpoint), "--ranks", "2", "--device", "cpu"]
    arguments += ["--data-dir", str(folder / "data"), *WAYS[way]]
    texts = _long_texts(options.checkpoint, options.tokens)
    async with AsyncExitStack() as stack:
        service = stack.enter_context(ServiceProcess(arguments, folder / "service.log"))
        await asyncio.to_thread(service.wait_ready, START_S, lambda _: None)
        client = await stack.enter_async_context(AsyncClient(service.address))
        asker = Asker(client, await client.upload(film.path), film)
        for number in range(3):
            await asker.ask_short(number)
        rows = []
        for tokens in options.tokens:
            long = f"{tokens}: {texts[tokens]}"
            rows.append({"way": way, **await _beside(asker, tokens, long, options.limit_s)})
            print(table(rows[-1:]), flush=True)
        return rows


class Asker:
    """Asks one service about one video.

    Attributes:
        failed: what short questions have failed with.
    """

    def __init__(self, client: AsyncClient, video: Video, film: Film) -> None:
        self._client = client
        self._video = video
        self._film = film
        self.failed: list[str] = []

    async def ask(self, text: str, max_tokens: int) -> tuple[float, int]:
        """Seconds to the end of the answer, and tokens of the prompt."""
        begin = time.monotonic()
        stream = self._client.ask(self._video, text, max_tokens=max_tokens, ignore_eos=True)
        answer = await stream.result()
        return time.monotonic() - begin, answer.usage.prompt_tokens

    async def ask_short(self, number: int) -> float:
        """Seconds to the end of a short answer; infinity if there is none."""
        try:
            return (await self.ask(self._film.question(number).text, MAX_TOKENS))[0]
        except Exception as error:
            self.failed.append(f"{type(error).__name__}: {error}"[:300])
            return float("inf")


async def _beside(asker: Asker, tokens: int, long: str, limit_s: float) -> dict[str, Any]:
    """Short questions alone and beside one long one."""
    asker.failed.clear()
    idle = [await asker.ask_short(number) for number in range(IDLE_QUESTIONS)]
    asking = asyncio.create_task(asker.ask(long, 1))
    begin = time.monotonic()
    beside: list[float] = []
    while not asking.done() and time.monotonic() < begin + limit_s:
        beside.append(await asker.ask_short(len(beside)))
    long_s = prompt = None
    if asking.done():
        long_s, prompt = asking.result()
    asking.cancel()
    await asyncio.wait({asking})
    found: dict[str, float] = {}
    for name, share in (("p50", 50), ("p95", 95)):
        alone, together = (float(np.percentile(times, share)) for times in (idle, beside))
        found |= {f"idle_{name}_s": alone, f"{name}_s": together, f"{name}_ratio": together / alone}
    return {
        "tokens": tokens,
        "prompt_tokens": prompt,
        "long_s": long_s,
        "beside": len(beside),
        "failed": list(asker.failed),
        **found,
    }


def _long_texts(checkpoint: Path, tokens: Sequence[int]) -> dict[int, str]:
    """A text of each number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(WORDS * (max(tokens) // 8), add_special_tokens=False)["input_ids"]
    return {count: str(tokenizer.decode(ids[:count])) for count in tokens}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.long_question",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[5_000, 20_000], help="of the long question")
    add("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="in this order")
    add("--limit-s", type=float, default=300.0, help="for the long question; %(default)s")
    add("--checkpoint", type=Path, default=ROOT / "assets" / "needle-qwen3-vl")
    add("--seed", type=int, default=1, help="of the video; %(default)s")
    add("--out", type=Path, default=tables.RESULTS / "long-question-cpu.json")
    return parser


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
