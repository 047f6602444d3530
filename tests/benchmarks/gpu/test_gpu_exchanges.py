"""The check itself: it passes here, and it would not if bytes or attention were wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import exchanges
from benchmarks.gpu.exchanges import check_exchanges, check_group, compare
from benchmarks.parallel.problem import Problem, Run
from benchmarks.parallel.ranks import transports
from prefill_service.parallel.exchanges.catalog import EXCHANGES, RING

SMALL = Problem(
    patch_ends=tuple(5 + 9 * (i + 1) for i in range(7)),
    chunk=20,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
)


def test_every_exchange_through_the_host() -> None:
    transport = transports("cpu")[-1]
    assert transport.staged
    rows = check_exchanges(transport, 2, {"small": SMALL}, dtypes=[torch.float32, torch.bfloat16])
    assert len(rows) == 2 * len(EXCHANGES)
    assert all(row["ok"] for row in rows), rows


def test_a_group_of_ranks_computes_what_one_computes() -> None:
    kinds = [RING]
    (row,) = check_group("qwen3_vl", "cpu", 2, dtype=torch.float32, seconds=1.0, kinds=kinds)
    assert row["ok"], row
    assert row["bytes"] > 0


@pytest.mark.parametrize("fault", ["nothing", "attention", "nan", "bytes", "tokens"])
def test_what_is_wrong_is_found(fault: str) -> None:
    kind = RING
    dtype = torch.float32
    wanted = torch.stack([SMALL.dense(i, dtype, torch.device("cpu")) for i in range(2)])
    received = (2 * SMALL.predicted(kind, 2, dtype).received).tolist()
    runs = []
    for rank in range(2):
        shares = SMALL.layout(kind, 2).of_rank(rank)
        ranges = [torch.arange(a, b) for share in shares for a, b in share.ranges]
        tokens = torch.cat(ranges)
        runs.append(
            Run(
                tokens=tokens,
                out=wanted[:, :, tokens].float(),
                received=received[rank],
                seconds=1.0,
            )
        )
    match fault:
        case "attention":
            runs[1].out[1, 3, -1, 0] += 1e-3
        case "nan":
            runs[1].out[0, 0, 0, 0] = torch.nan
        case "bytes":
            runs[0] = replace(runs[0], received=received[0] + 4)
        case "tokens":
            runs[0] = replace(runs[0], tokens=runs[0].tokens[1:], out=runs[0].out[:, :, 1:])
    assert compare(SMALL, kind, dtype, runs=runs, wanted=wanted)["ok"] == (fault == "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert exchanges.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
