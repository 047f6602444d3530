from __future__ import annotations

import math
from itertools import count, repeat

import pytest
from client_helpers import Api, make_client

from prefill_client import ArgumentError, InvalidRequestError, Message

LONE = "Is it \ud83d?"  # half of a surrogate pair, as cut UTF-16 has it
HUGE = 10**5000  # more digits than Python prints


@pytest.mark.parametrize(
    ("question", "named"),
    [
        (LONE, r"question = '\\ud83d' .* index 6 of 8"),
        (b"Who?", r"question = b'Who\?' is not accepted; expected text, or a list of messages"),
        (7, "question = 7 "),
        (HUGE, r"question = \.\.\. "),
        (None, "question = None "),
        ({"role": "user", "content": "Who?"}, r"question = {.*} \(dict\) .* a list of messages"),
        (["Who?"], r"question\[0\] = 'Who\?' .* expected a Message"),
        ([None], r"question\[0\] = None "),
        ([{"role": "user"}], r"question\[0\] = .* role and content, and nothing else"),
        ([{"role": "user", "content": "x", "name": "y"}], r"question\[0\] = .* and nothing else"),
        ([Message("user", 5)], r"question\[0\]\.content = 5 .* expected text"),
        ([Message("user", b"x")], r"question\[0\]\.content = b'x' .* expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content = \[.*\] \(list\)"),
        ([Message("user", "x"), Message("assistant", LONE)], r"question\[1\]\.content = "),
        ([{"role": None, "content": "x"}], r"question\[0\]\.role = None "),
        ([{"role": 1, "content": "x"}], r"question\[0\]\.role = 1 "),
        ([{"role": "User", "content": "x"}], r"role = 'User' .* expected user, assistant, or"),
        ([Message("user", "x"), Message("system", "y")], r"question\[1\]\.role = 'system' "),
        ("x" * (5 << 20), "question = '5242[0-9]* bytes' .* at most 4194304 bytes"),
    ],
    ids=map(str, count()),  # a huge integer has no text
)
async def test_a_question_that_cannot_be_sent(api: Api, server, clip, question, named):
    with pytest.raises(ArgumentError, match=named) as caught:
        await api.answer(clip, question)
    assert not server.state.calls  # nor was the file uploaded
    assert isinstance(caught.value, InvalidRequestError)
    assert caught.value.reason == "INVALID_REQUEST"
    assert set(caught.value.metadata) == {"name", "value", "accepted"}
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 2**63}, "seed = 9223372036854775808 .* 0 to 9223372036854775807"),
        ({"seed": -1}, "seed = -1 .* 0 to"),
        ({"seed": HUGE}, "seed = '16610 bits'"),
        ({"seed": 1.0}, r"seed = 1\.0 .* an integer"),
        ({"seed": True}, "seed = True .* an integer"),
        ({"max_tokens": 2**31}, "max_tokens = 2147483648 .* 1 to 2147483647"),
        ({"max_tokens": 0}, "max_tokens = 0 .* 1 to"),
        ({"top_k": -2}, "top_k = -2 .* -1 to"),
        ({"temperature": math.nan}, "temperature = nan .* 0 or more and at most 100"),
        ({"temperature": math.inf}, "temperature = inf "),
        ({"temperature": "0"}, "temperature = '0' .* a number"),
        ({"temperature": 1j}, r"temperature = 1j \(complex\)"),
        ({"temperature": HUGE}, "temperature = inf "),
        ({"top_p": 0}, "top_p = 0 .* more than 0 and at most 1"),
        ({"repetition_penalty": -math.inf}, "repetition_penalty = -inf "),
        ({"ignore_eos": "no"}, "ignore_eos = 'no' .* True or False"),
        ({"fps": 0.0}, r"fps = 0\.0 .* a number, more than 0 and at most 10000"),
        ({"fps": math.nan}, "fps = nan "),
        ({"num_frames": 0}, "num_frames = 0 "),
        ({"num_frames": 8, "fps": 1.0}, "num_frames = 8 .* nothing beside fps"),
        ({"num_frames": 8, "max_frames": 9}, "num_frames = 8 .* nothing beside max_frames"),
        ({"sample_by": "second"}, "sample_by = 'second' .* one of frame, time"),
        ({"max_frames": 10**30}, "max_frames = 10+ .* 1 to 2147483647"),
        ({"max_pixels": 0}, "max_pixels = 0 .* 1 to 17592186044416"),
        ({"min_pixels": 2**63}, "min_pixels = 9223372036854775808 "),
        ({"cap_pixels_per_frame": 2}, "cap_pixels_per_frame = 2 "),
        ({"epsilon": 1}, "epsilon = 1 .* 0 or more and less than 1"),
        ({"min_kept_mass": math.nan}, "min_kept_mass = nan "),
        ({"quality": "best"}, "quality = 'best' .* one of exact, high"),
        ({"quality": ["high"]}, "quality = .* one of exact, high"),
        ({"comparison": 3}, "comparison = 3 .* one of spava"),
        ({"comparison": "star", "passing_tokens": -1}, "passing_tokens = -1 "),
        ({"comparison": "star", "comparison_question": LONE}, "comparison_question = "),
        ({"system_prompt": LONE}, "system_prompt = "),
        ({"system_prompt": b"x"}, "system_prompt = b'x' "),
        ({"stop": b"x"}, "stop = b'x' "),
        ({"stop": 3}, "stop = 3 "),
        ({"stop": ["a", None]}, r"stop\[1\] = None "),
        ({"stop": ["a", ""]}, r"stop\[1\] = '' .* 1 to 1024 bytes"),
        ({"stop": ["a"] * 17}, "stop = .* at most 16 texts"),
        ({"stop": repeat("a")}, "stop = .* at most 16 texts"),
        ({"timeout": math.nan}, "timeout = nan "),
        ({"timeout": 0}, "timeout = 0 .* more than 0"),
        ({"request_id": "mine"}, "request_id = 'mine' .* a UUID"),
        ({"request_id": 7}, "request_id = 7 "),
    ],
    ids=map(str, count()),
)
async def test_an_option_that_cannot_be_sent(api: Api, server, clip, options, named):
    with pytest.raises(ArgumentError, match=named):
        await api.answer(clip, "Who?", **options)
    assert not server.state.calls


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("video", (5,), "video_id = 5 .* text"),
        ("video", (LONE,), r"video_id = '\\ud83d'"),
        ("delete_video", (None,), "video_id = None "),
        ("job", (b"job_1",), "job_id = b'job_1' "),
        ("cancel_job", (None,), "job_id = None "),
        ("inspect_job", (1,), "job_id = 1 "),
        ("import_video", ("https://x.org/a.mp4",), "path = .* URLs are not fetched"),
        ("import_video", (LONE,), r"path = 'Is it \\ud83d\?' .* the path of a file"),
        ("import_video", (None,), "path = None "),
        ("prefill", (3,), "video = 3 .* a Video, the id of one, a path, bytes or"),
        ("prefill", (None,), "video = None "),
        ("upload", (None,), "path = None .* expected a path, bytes or"),
    ],
)
async def test_an_argument_that_cannot_be_sent(api: Api, server, method, arguments, named):
    with pytest.raises(ArgumentError, match=named):
        await api.call(method, *arguments)
    assert not server.state.calls


async def test_lists_and_uploads_check_their_arguments(api: Api, server, clip):
    for name in ("videos", "jobs"):
        with pytest.raises(ArgumentError, match=r"page_size = -1 .* 0 to 2147483647"):
            await api.collect(name, page_size=-1)
    with pytest.raises(ArgumentError, match=r"sha256 = 'ab' .* 64 hexadecimal digits"):
        await api.call("upload", clip, sha256="ab")
    with pytest.raises(ArgumentError, match=r"display_name = '\\ud83d'"):
        await api.call("upload", clip, display_name=LONE)
    assert not server.state.calls


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"timeout": math.inf}, "timeout = inf "),
        ({"finish_timeout": -1}, "finish_timeout = -1 "),
        ({"token": b"x"}, "token = b'x' .* text"),
    ],
)
def test_a_client_checks_its_arguments(kind, arguments, named):
    with pytest.raises(ArgumentError, match=named):
        make_client(kind, "localhost:1", **arguments)


def test_a_client_checks_its_address(kind):
    for address in (None, b"localhost:1", ""):
        with pytest.raises(ArgumentError, match="address = "):
            make_client(kind, address)


async def test_numbers_of_any_kind_are_taken(api: Api, server, clip):
    from fractions import Fraction

    class Five:
        def __index__(self) -> int:
            return 5

    await api.answer(clip, "Who?", seed=2**63 - 1, max_tokens=Five(), fps=Fraction(1, 2), top_k=-1)
    request = server.state.asks[0]
    params = request.sampling_params
    assert (params.seed, params.max_tokens, params.top_k) == (2**63 - 1, 5, -1)
    assert request.spec.sampling.fps == 0.5
