"""``serve --help``: every option once, the most used first, the rest by section."""

from __future__ import annotations

import dataclasses
import re

import pytest

from prefill_service.cli.main import main, make_parser
from prefill_service.config import ServiceConfig
from prefill_service.parallel.exchanges.catalog import EXCHANGES

MOST_USED = [
    "--config",
    "--model",
    "--ranks",
    "--device",
    "--dtype",
    "--host",
    "--port",
    "--[no-]insecure",
    "--data-dir",
    "--vllm-url",
]


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def shown(text: str) -> list[str]:
    return re.findall(r"^  (--\S+)", text, re.M)


def test_each_option_is_shown_once_with_its_default(text: str) -> None:
    fields = [
        option
        for section in dataclasses.fields(ServiceConfig)
        for option in dataclasses.fields(getattr(ServiceConfig(), section.name))
    ]
    options = shown(text)
    assert len(set(options)) == len(options) == len(fields) + 2  # --config and --log-level
    flat = " ".join(text.split())
    names = ", ".join(kind.name for kind in EXCHANGES)
    for part in (
        "--model TEXT Folder or hub id of the checkpoint. (default: none)",
        "--ranks N Ranks of the sequence-parallel group. (default: 2)",
        "--[no-]insecure Allow a non-loopback address without TLS. (default: off)",
        "--storage-import-roots TEXT Folders ImportVideo may read from. May be repeated.",
        "--engine-sparse-from-tokens N Queries that see fewer keys attend exactly; 0: measured",
        "--engine-sparse-block-tokens N Keys per block of sparse attention. One of 64, 128. (def",
        f"One of {names}, auto. (default: gather)",
        "The workers that prefill: model, ranks, attention, KV memory, time limits.",
    ):
        assert part in flat


def test_the_most_used_come_first_then_the_sections(text: str) -> None:
    assert shown(text)[:10] == MOST_USED
    sections = [section.name for section in dataclasses.fields(ServiceConfig)]
    assert re.findall(r"^(\w[\w ]*):\n", text, re.M) == [
        "most used",
        *sections,
        "logging and help",
    ]


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("--engine-model", "engine.model"),
        ("--storage-data-dir", "storage.data_dir"),
        ("--vllm-max-model-len", "vllm.max_model_len"),
        ("--decoder-max-model-len", "vllm.max_model_len"),
        ("--decoder-url", "vllm.url"),
    ],
)
def test_long_and_earlier_spellings_are_accepted_and_not_shown(
    spelling: str, key: str, text: str
) -> None:
    assert spelling not in text
    args = make_parser().parse_command(["serve", spelling, "7"])
    assert str(vars(args)[key]) == "7"


def test_an_option_that_can_be_switched_off() -> None:
    args = make_parser().parse_command(["serve", "--no-engine-elastic", "--server-insecure"])
    assert vars(args)["engine.elastic"] is False
    assert vars(args)["server.insecure"] is True
