"""The gather exchange on real gloo ranks, against dense float64 attention."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from prefill_service.parallel.gather import GatherExchange
from prefill_service.parallel.group import form_group
from prefill_service.parallel.layout import deal_patches

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
CPU = torch.device("cpu")


def qkv(tokens: int, group: int) -> torch.Tensor:
    """[layers, heads, tokens, head_dim] in float64: group*KV_HEADS of q, then K, then V."""
    shape = (LAYERS, (group + 2) * KV_HEADS, tokens, HEAD_DIM)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def dense(data: torch.Tensor, group: int) -> torch.Tensor:
    q_heads = group * KV_HEADS
    q, k, v = data.split([q_heads, KV_HEADS, KV_HEADS], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT) * 0.25
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


CASES = [([10], 8, 1), ([3 + 7 * (i + 1) for i in range(11)], 20, 4), ([9, 11, 40], 1000, 7)]
"""patch ends, tokens per chunk and rank, GQA ratio"""


def run_rank(rank: int, size: int, init: str, out: str) -> None:
    torch.set_num_threads(1)
    group = form_group(rank, size, init, CPU, 60.0)
    for case, (ends, chunk, ratio) in enumerate(CASES):
        before = group.meter.bytes_received
        data = qkv(ends[-1], ratio)
        q_heads = ratio * KV_HEADS
        exchange = GatherExchange(group, LAYERS, ends[-1], KV_HEADS, HEAD_DIM, torch.float64, CPU)
        result = torch.zeros(LAYERS, q_heads, ends[-1], HEAD_DIM, dtype=torch.float64)
        for shares in deal_patches(ends, size, chunk).shares:
            exchange.start_chunk([(s.start_token, s.end_token) for s in shares])
            mine = slice(shares[rank].start_token, shares[rank].end_token)
            for layer in range(LAYERS):
                q, k, v = data[layer, :, mine].split([q_heads, KV_HEADS, KV_HEADS])
                exchange.store(layer, k.transpose(0, 1), v.transpose(0, 1))
                result[layer, :, mine] = exchange.attend(layer, q, 0.25)
        exchange.finish()
        received = group.meter.bytes_received - before
        torch.save({"out": result, "bytes": received}, f"{out}/{case}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_dense_attention_and_moves_the_minimum(size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    init = f"file://{tmp_path}/rendezvous"
    processes = [
        context.Process(target=run_rank, args=(r, size, init, str(tmp_path)), daemon=True)
        for r in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size

    for case, (ends, _, ratio) in enumerate(CASES):
        results = [torch.load(tmp_path / f"{case}-{rank}.pt") for rank in range(size)]
        out = sum(result["out"] for result in results)  # each rank filled its own tokens
        torch.testing.assert_close(out, dense(qkv(ends[-1], ratio), ratio), rtol=0, atol=1e-9)
        # 2 h_kv d e N (P-1)/P per layer and rank, summed over the ranks, to the byte
        total = sum(result["bytes"] for result in results)
        assert total == LAYERS * 2 * KV_HEADS * HEAD_DIM * 8 * ends[-1] * (size - 1)
