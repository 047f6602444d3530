"""The toy exchange passes what all others pass, its entry and formulas added as the recipe says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import parallel
from prefill_service.cost_model.presets import PRESETS
from prefill_service.cost_model.strategies import Strategy, strategies
from prefill_service.cost_model.traffic import memory_bytes, traffic
from prefill_service.parallel.chunking import deal_tokens
from prefill_service.parallel.exchanges.catalog import EXCHANGES
from tests.parallel import toy_exchange
from tests.parallel.conformance import check_exchange
from tests.parallel.toy_exchange import SEND_TO_ALL

ROOT = Path(__file__).resolve().parent.parent.parent
OVER_THE_CATALOGUE = (
    "tests/cli/test_estimate.py::test_json_has_all_candidates",
    "tests/cli/test_serve_help.py::test_each_option_is_shown_once_with_its_default",
    "tests/cost_model/test_search.py",
    "tests/cost_model/test_traffic.py::test_chunks_move_what_a_walk_counts",
    "tests/parallel/test_exchanges.py::test_every_rank_receives_what_the_papers_say[2]",
    "tests/cli/test_config_loading.py::test_refusals_name_file_option_and_what_is_accepted",
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_it_conforms(size: int, tmp_path: Path) -> None:
    check_exchange([SEND_TO_ALL], size, tmp_path)


def test_the_cost_model_costs_it() -> None:
    [strategy] = strategies(4, [SEND_TO_ALL])
    assert strategy == Strategy(SEND_TO_ALL, 4)
    assert strategy not in list(strategies(4, EXCHANGES))
    shape = PRESETS["qwen3-vl-8b"]
    chunking = deal_tokens(8192, 4, 512)
    received = traffic(strategy, shape, chunking).received
    assert received.tolist() == [shape.row_bytes * 8192 * 3 // 4] * 4
    assert memory_bytes(strategy, shape, chunking) == 35 * 8192 * shape.row_bytes


def test_what_goes_over_the_catalogue_takes_it() -> None:
    """In a process of its own: modules read the catalogue when they are imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", toy_exchange.__name__, *OVER_THE_CATALOGUE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_process_has_it_in_the_catalogue() -> None:
    """Otherwise the test above would show nothing."""
    code = (
        "from tests.parallel.toy_exchange import pytest_load_initial_conftests as add; add();"
        "from prefill_service.cli.main import main; main(['serve', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "send_to_all, auto. (default: gather)" in " ".join(done.stdout.split())


def test_it_has_a_row_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "EXCHANGES", (*EXCHANGES, SEND_TO_ALL))
    *before, row = parallel.exchanges().splitlines()
    monkeypatch.undo()
    assert len(before) == len(parallel.exchanges().splitlines())
    for text in ("`send_to_all`", SEND_TO_ALL.description, SEND_TO_ALL.bytes_received):
        assert text in row
