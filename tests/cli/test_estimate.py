"""``prefill-service estimate``: what it prints, and its errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefill_service.cli.main import main
from prefill_service.cost_model.cost import ASSUMED
from prefill_service.cost_model.profile import load_profile, save_profile
from prefill_service.parallel.exchanges.catalog import EXCHANGES

LONG = ["estimate", "--tokens", "1000000", "--ranks", "8"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*LONG, *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_is_aligned_and_gives_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert lines[0] == "Qwen3-VL-8B, 1,000,000 tokens, up to 8 ranks"
    assert lines[1].startswith("assumed: Qwen3-VL-8B; 400 TFLOP/s in linear layers, 300 in")
    assert lines[2].startswith("cost model (assumed): A = 7.2 ms per chunk, B = ")
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["exchange"])
    rows = lines[first + 1 : lines.index("", first)]
    end = lines[first].index("K/V per rank") + len("K/V per rank")
    assert all(row[:end].endswith(("GiB", "MiB")) or row[:end].split()[-1] in "248" for row in rows)
    assert [row[:1] for row in rows].count("*") == 1
    assert rows[0].startswith("*")
    gather = next(row for row in rows if " gather " in row)
    assert gather.endswith("K/V of 133.5 GiB per rank exceeds 40.0 GiB")
    assert lines[-1].split(" on ")[0] == rows[0].split("  ")[1]
    assert "candidates that fit" in lines[-1]


def test_what_is_given_is_not_called_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assumed = printed(
        capsys,
        *("--preset", "Qwen2.5-VL-7B"),
        *("--link", "5"),
        *("--latency", "50"),
        *("--density", "1"),
        *("--memory", "80"),
    ).splitlines()[1]
    assert assumed == (
        "assumed: 400 TFLOP/s in linear layers, 300 in attention, 200 us per layer and chunk"
    )


def test_a_slower_link_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for link in ("100", "1"):
        found = json.loads(printed(capsys, "--json", "--link", link))
        seconds.append(found["chosen"]["seconds"])
    assert seconds[1] > 1.1 * seconds[0]


def test_json_has_all_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--json", "--density", "0.2"))
    assert found["tokens"] == 1_000_000
    assert found["model"] == {
        "name": "Qwen3-VL-8B",
        "layers": 36,
        "hidden": 4096,
        "intermediate": 12288,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "bytes_per_element": 2,
    }
    assert found["cost_model"]["provenance"] == "assumed"
    assert found["chosen"] in found["candidates"]
    assert found["chosen"]["rejected"] is None
    names = {candidate["exchange"] for candidate in found["candidates"]}
    assert names == {exchange.name for exchange in EXCHANGES}
    lines = printed(capsys, "--all", "--density", "0.2").splitlines()
    assert len(lines) == len(found["candidates"]) + 7


def test_larger_blocks_have_fewer_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    received = []
    for block in ("64", "128"):
        found = json.loads(printed(capsys, "--json", "--density", "0.2", "--block-tokens", block))
        received.append(
            {
                (one["ranks"], one["chunk_tokens"]): one["bytes_received"]
                for one in found["candidates"]
                if one["exchange"] == "demand" and one["ranks"] > 1
            }
        )
    assert received[0].keys() == received[1].keys()
    assert all(received[1][key] < received[0][key] for key in received[0])


def test_profiles_are_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    save_profile(ASSUMED, path)
    assert "assumed: Qwen3-VL-8B; exact" in printed(capsys, "--profile", str(path))
    saved = tmp_path / "saved.json"
    printed(capsys, "--link", "5", "--save", str(saved))
    assert load_profile(saved).per_byte == pytest.approx(1 / 5e9)


def test_a_checkpoint_and_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = printed(capsys, "--model", str(tmp_path), "--probe")
    assert text.startswith(f"{tmp_path.name}, 1,000,000 tokens")
    assert "cost model (probe of " in text
    assert "assumed: a link of 25 GB/s; 20 us latency; exact" in text


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--tokens", "0"], 2, "--tokens = 0 is not accepted; expected 1 or more"),
        (["--ranks", "0"], 2, "--ranks = 0 is not accepted"),
        (["--ranks", "two"], 2, "invalid int value: 'two'"),
        (["--link", "0"], 2, "--link = 0.0 is not accepted; expected more than 0"),
        (["--link", "nan"], 2, "--link = nan"),
        (["--latency", "-1"], 2, "--latency = -1.0"),
        (["--density", "1.5"], 2, "--density = 1.5 is not accepted; expected more than 0 and at"),
        (["--memory", "inf"], 2, "--memory = inf"),
        (["--parallel-links", "0"], 2, "--parallel-links = 0"),
        (["--preset", "gpt"], 2, "preset 'gpt' is not known; known are"),
        (["--preset", "a", "--model", "b"], 2, "not allowed with argument"),
        (["--profile", "/nowhere.json"], 2, "profile /nowhere.json cannot be read"),
        (["--profile", "p", "--probe"], 2, "exclude each other"),
        (
            ["--model", "/nowhere"],
            1,
            "/nowhere: config.json: missing",
        ),
        (["--memory", "1"], 1, "1,000,000 tokens of Qwen3-VL-8B on up to 8 ranks do not fit"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found: object = main([*LONG, *arguments])
    except SystemExit as exit_:
        found = exit_.code
    error = capsys.readouterr().err
    assert found == code
    assert text in error
    assert error.count("\n") == 1


def test_another_name_of_the_command_says_which_one_it_stands_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = printed(capsys)
    assert main(["plan", *LONG[1:]]) == 0
    found = capsys.readouterr()
    assert found.out == expected
    assert found.err == "prefill-service: plan stands for estimate\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "plan" not in capsys.readouterr().out.split()
