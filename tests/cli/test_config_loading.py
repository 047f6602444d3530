"""Configuration: where values come from, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from prefill_service.cli.config_loading import resolve_config
from prefill_service.config import ServiceConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.exchanges.catalog import EXCHANGES


def write(folder: Path, text: str) -> Path:
    path = folder / "service.toml"
    path.write_text(text)
    return path


def refused(text: str, folder: Path) -> str:
    with pytest.raises(ServiceError) as raised:
        resolve_config(write(folder, text), {})
    assert raised.value.reason is Reason.CONFIG_INVALID
    return raised.value.message


def test_every_default_is_accepted() -> None:
    assert resolve_config(None, {}).config == ServiceConfig()


def test_each_value_has_a_source(tmp_path: Path) -> None:
    path = write(tmp_path, "[engine]\nranks = 3\npage_tokens = 32\n")
    resolved = resolve_config(path, {"engine": {"ranks": 4}})
    assert resolved.config.engine.ranks == 4
    assert resolved.sources["engine.ranks"] == "command line"
    assert resolved.sources["engine.page_tokens"] == f"file {path}"
    assert resolved.sources["server.port"] == "default"
    assert len(resolved.sources) == sum(
        len(dataclasses.fields(getattr(resolved.config, section.name)))
        for section in dataclasses.fields(ServiceConfig)
    )


def test_lists_are_not_shared() -> None:
    ServiceConfig().vllm.extra_args.append("--x")
    assert ServiceConfig().vllm.extra_args == []


def test_an_earlier_section_name_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve_config(write(tmp_path, "[decoder]\nmax_model_len = 5\n"), {}).config
    assert config.vllm.max_model_len == 5
    assert "section [decoder] is called [vllm] now" in caplog.text
    both = refused("[decoder]\nblock_size = 5\n[vllm]\nblock_size = 5\n", tmp_path)
    assert both.endswith("[decoder] is an earlier name of [vllm]; the file has both")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engin]\nranks = 2", "there is no section engin; did you mean engine?"),
        ("[xyz]\nranks = 2", "there is no section xyz; there are server, storage, video, engine"),
        ("[engine]\nrank = 2", "there is no option engine.rank; did you mean engine.ranks?"),
        ("[engine]\nranks = 65", "engine.ranks = 65 is not accepted; expected 1 to 64"),
        ("[engine]\nranks = true", "engine.ranks = True is not accepted; expected a value of type"),
        (
            "[engine]\nranks = '2'",
            "engine.ranks = '2' is not accepted; expected a value of type int",
        ),
        ("engine = 3", "engine = 3 is not accepted; expected a table"),
        (
            "[engine]\ndevice = 'tpu'",
            "engine.device = 'tpu' is not accepted; expected auto, cpu or",
        ),
        (
            "[engine]\nexchange = 'x'",
            f"expected {', '.join(kind.name for kind in EXCHANGES)} or auto",
        ),
        (
            "[engine]\nbalance_above = 0.5",
            "engine.balance_above = 0.5 is not accepted; expected 0,",
        ),
        ("[engine]\nulysses_degree = 3", "expected a divisor of the 2 ranks"),
        ("[server]\ntls_cert = 'a'", "expected tls_cert and tls_key together"),
        ("[storage]\nimport_roots = 'a'", "expected a list of strings"),
        ("[vllm]\nurl = 'localhost'", "expected an http:// or https:// URL"),
        ("[vllm]\ngpu_memory_utilization = 1.1", "expected more than 0 and at most 1"),
        ("[vllm", "is not valid TOML"),
    ],
)
def test_refusals_name_file_option_and_what_is_accepted(
    text: str, message: str, tmp_path: Path
) -> None:
    told = refused(text, tmp_path)
    assert message in told
    assert str(tmp_path / "service.toml") in told


def numbers() -> list[tuple[str, str, Any]]:
    config = ServiceConfig()
    return [
        (section.name, option.name, getattr(getattr(config, section.name), option.name))
        for section in dataclasses.fields(config)
        for option in dataclasses.fields(getattr(config, section.name))
    ]


@pytest.mark.parametrize(
    ("section", "name", "default"),
    [one for one in numbers() if type(one[2]) in (int, float)],
)
def test_no_number_may_be_negative_or_infinite(section: str, name: str, default: float) -> None:
    wrong = [-1.0, math.inf, math.nan] if isinstance(default, float) else [-1]
    for value in wrong:
        with pytest.raises(ServiceError, match=f"{section}.{name} = "):
            resolve_config(None, {section: {name: value}})
