"""HTTP to a vLLM server: health, model length, and one streamed generation."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aiohttp

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.detokenizer import Detokenizer
from prefill_service.generation.grid_item import video_features
from prefill_service.kv.handoff import HandoffParams
from prefill_service.models.prefix_plan import PrefixPlan

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHECK_TIMEOUT_S = 5.0
_MAX_EVENT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode; mirrors ``prefill.v1.SamplingParams``.

    ``None`` is the checkpoint's default, if ``fill_in`` has one, else vLLM's; a temperature that
    nobody names is 0. The last three are the checkpoint's alone.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def fill_in(self, defaults: Mapping[str, float]) -> Sampling:
        """These parameters, with ``defaults`` by vLLM's names for those that are ``None``."""
        unset: dict[str, Any] = {
            name: value
            for name, value in defaults.items()
            if name != "max_tokens" and getattr(self, name) is None
        }
        return replace(self, **unset)

    def to_vllm(self) -> dict[str, Any]:
        """``sampling_params`` of vLLM."""
        values: dict[str, Any] = {
            "temperature": self.temperature or 0.0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": list(self.stop) or None,
            "repetition_penalty": self.repetition_penalty,
            "ignore_eos": self.ignore_eos,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One question over a prefix.

    Attributes:
        token_ids: the whole prompt; it begins with the plan's tokens.
        plan: the prefix.
        handoff: where its KV is. The lease id belongs to this request alone.
        sampling: how to decode.
        request_id: for vLLM's logs; unique.
        prefilled: False while the ranks still compute the prefix: vLLM is then silent until they
            have finished, however long that takes.
        last_sign: ``time.monotonic()`` at which vLLM was last known to work on the prompt. It takes
            in a long one without sending a byte.
    """

    token_ids: list[int]
    plan: PrefixPlan
    handoff: HandoffParams
    sampling: Sampling
    request_id: str
    prefilled: bool = True
    last_sign: Callable[[], float] = lambda: -math.inf


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """A piece of the answer; the last one has ``finish_reason`` and the counts."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class VllmClient:
    """Requests to one vLLM server.

    Args:
        session: where its connections live; the caller closes it.
        url: base URL of the server.
        timeout_s: longest silence within one answer.
        api_key: what the server was started with (``vllm serve --api-key``), if anything.

    Attributes:
        headers: what every request to the server carries.
        tokenizer: makes the text of answers, for a vLLM that sends token ids only.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, timeout_s: float, *, api_key: str = ""
    ) -> None:
        self._session = session
        self.url = url.rstrip("/")
        self.tokenizer: Tokenizer | None = None
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        self._silence_s = timeout_s
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def check_health(self) -> None:
        """Ask the server's ``/health`` whether it can serve.

        Raises:
            ServiceError: DECODER_UNAVAILABLE.
        """
        await self._get("/health")

    async def check_engine(self, timeout_s: float) -> None:
        """Have one token made. ``/health`` does not notice an engine that hangs; this does.

        Raises:
            ServiceError: DECODER_UNAVAILABLE, nothing came within ``timeout_s``.
        """
        body = {
            "token_ids": [0],
            "sampling_params": {"max_tokens": 1, "temperature": 0.0},
            "stream": False,
        }
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            url = f"{self.url}/inference/v1/generate"
            async with self._session.post(
                url, json=body, timeout=timeout, headers=self.headers
            ) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unavailable(
                f"vLLM at {self.url} has not made a token within {timeout_s:g} s: "
                f"{_describe(error)}; the limit is vllm.stall_timeout_s"
            ) from error

    async def max_model_len(self) -> int:
        """Context of the served model in tokens, from ``/v1/models``.

        Raises:
            ServiceError: DECODER_UNAVAILABLE if it cannot be had.
        """
        body = await self._get("/v1/models")
        try:
            return int(json.loads(body)["data"][0]["max_model_len"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _unavailable(f"{self.url}/v1/models answered {body[:200]!r}") from error

    async def version(self) -> str:
        """vLLM's release, from ``/version``.

        Raises:
            ServiceError: DECODER_UNAVAILABLE if it cannot be had.
        """
        body = await self._get("/version")
        try:
            return str(json.loads(body)["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise _unavailable(f"{self.url}/version answered {body[:200]!r}") from error

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Stream an answer. Closing the iterator aborts the request in vLLM.

        Raises:
            ServiceError: DECODER_UNAVAILABLE if vLLM is unreachable, silent or dies;
                DECODER_FAILED if it answers with an error. vLLM's text for a failed hand-off
                is generic: the cause is in the hand-off report.
        """
        body = {
            "request_id": request.request_id,
            "token_ids": request.token_ids,
            "features": video_features(request.plan),
            "sampling_params": request.sampling.to_vllm(),
            "kv_transfer_params": request.handoff.to_kv_transfer_params(),
            "output_mode": "text",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{self.url}/inference/v1/generate"
        silence_s = self._silence_s
        try:
            async with asyncio.timeout(silence_s):
                response = await self._session.post(
                    url, json=body, timeout=self._timeout, headers=self.headers
                )
            async with response:
                if response.status != 200:
                    raise _failed(response.status, await response.text())
                events = _events(_Pieces(response, request, silence_s))
                if self.tokenizer is not None:
                    events = _with_text(events, self.tokenizer, request)
                async for event in events:
                    yield event
        except TimeoutError as error:
            raise _unavailable(
                f"vLLM at {self.url} was silent for {silence_s:g} s; the limit is "
                "vllm.request_timeout_s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _unavailable(f"vLLM at {self.url} broke off: {_describe(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServiceError(
                Reason.DECODER_FAILED, f"vLLM at {self.url} sent what cannot be read: {error!r}"
            ) from error

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=_CHECK_TIMEOUT_S)
        try:
            url = self.url + path
            async with self._session.get(url, timeout=timeout, headers=self.headers) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unavailable(f"vLLM at {self.url}{path}: {_describe(error)}") from error
        if response.status != 200:
            raise _unavailable(f"vLLM at {self.url}{path} answered {response.status}: {text[:200]}")
        return text


async def _events(pieces: _Pieces) -> AsyncIterator[GenerationEvent]:
    """Server-sent events to ``GenerationEvent``; the final one joins finish reason and usage."""
    finish_reason = ""
    usage = None
    async for chunk in _data_lines(pieces):
        if "error" in chunk:
            raise _failed(chunk["error"].get("code"), json.dumps(chunk))
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices", []):
            finish_reason = choice.get("finish_reason") or finish_reason
            text = choice.get("text") or ""
            token_ids = tuple(choice.get("token_ids") or ())
            if text or token_ids:
                yield GenerationEvent(text, token_ids)
    if not finish_reason or usage is None:
        raise _unavailable("vLLM ended the stream before the answer was complete")
    details = usage.get("prompt_tokens_details") or {}
    yield GenerationEvent(
        finish_reason=finish_reason,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
    )


async def _with_text(
    events: AsyncIterator[GenerationEvent], tokenizer: Tokenizer, request: GenerationRequest
) -> AsyncIterator[GenerationEvent]:
    """The events with the text of their tokens, which the server left out."""
    detokenizer = Detokenizer(tokenizer, request.token_ids, request.sampling.stop)
    async for event in events:
        text = detokenizer.add(event.token_ids)
        if event.finish_reason:
            rest = detokenizer.finish()
            if rest:
                yield GenerationEvent(rest)
        yield replace(event, text=text)


async def _data_lines(pieces: _Pieces) -> AsyncIterator[dict[str, Any]]:
    """JSON of the stream's ``data:`` lines; a longer silence than allowed is a TimeoutError."""
    buffer = b""
    while data := await pieces.read():
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))
        if len(buffer) > _MAX_EVENT_BYTES:
            raise _failed(pieces.status, f"an event of more than {_MAX_EVENT_BYTES} bytes")


class _Pieces:
    """The body of a response as it comes, and how long it may be silent.

    Before the first piece a sign of work on the prompt counts as well; while the ranks compute the
    prefix there is no limit.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, request: GenerationRequest, silence_s: float
    ) -> None:
        self.status = response.status
        self._content = response.content
        self._request = request
        self._silence_s = silence_s
        self._first = True

    async def read(self) -> bytes:
        """The next piece; empty at the end.

        Raises:
            TimeoutError: the silence was too long.
        """
        since = time.monotonic()
        while True:
            limit_s = None
            if not self._first or self._request.prefilled:
                limit_s = max(0.0, since + self._silence_s - time.monotonic())
            try:
                async with asyncio.timeout(limit_s):
                    data = await self._content.readany()
            except TimeoutError:
                sign = self._request.last_sign()
                if not self._first or sign <= since:
                    raise
                since = sign
                continue
            self._first = False
            return data


def _failed(status: object, text: str) -> ServiceError:
    message = text
    with suppress(ValueError, KeyError, TypeError):
        message = json.loads(text)["error"]["message"]
    return ServiceError(
        Reason.DECODER_FAILED,
        f"vLLM answered {status}: {message[:1000]}",
        http_status=status,
        vllm_message=message[:1000],
    )


def _unavailable(message: str) -> ServiceError:
    return ServiceError(Reason.DECODER_UNAVAILABLE, message)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
