"""What happens around every call: admission, errors, one log line.

One interceptor for all methods of ``prefill.v1``, because the order matters: an error of the
admission is reported and logged like any other.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc

from prefill_service.api.call_limits import UPLOAD, CallLimit, address_of
from prefill_service.api.limits import check_request
from prefill_service.api.malformed import MalformedRequest, tolerant
from prefill_service.api.security import BearerToken
from prefill_service.api.servicer import Context
from prefill_service.api.status import abort
from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics

logger = logging.getLogger(__name__)

_OURS = "/prefill.v1."
_HEALTH = "/grpc.health.v1.Health/"
_ID_FIELDS = ("request_id", "video_id", "job_id")
_HOLDERS = ("spec", "job", "video")
_ID_CHARACTERS = 64


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Admits, bounds, reports and logs calls.

    Health checks pass: they carry no token, and must not fail under load.

    Args:
        config: limits of the calls of ``prefill.v1`` at once.
        metrics: counts the calls of ``prefill.v1`` that have ended.
        token: the bearer token that clients must send, if any.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, token: BearerToken) -> None:
        share = config.max_peer_share
        self._calls = CallLimit("calls", config.max_concurrent_calls, peer_share=share)
        self._uploads = CallLimit("uploads", config.max_uploads, peer_share=share)
        self.metrics = metrics
        self.token = token
        self.draining = False
        self.cut_off = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Refuse new calls; True once none runs, False if some still do after ``timeout_s``."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def cut_off_calls(self) -> None:
        """End the calls that still run: their clients are told that the service shuts down."""
        self.cut_off = True
        for task in self._tasks:
            task.cancel()

    def note_task(self, task: asyncio.Task[Any]) -> Callable[[], None]:
        """Keep the task of a call, until what is returned is called."""
        self._tasks.add(task)
        return lambda: self._tasks.discard(task)

    @property
    def running(self) -> int:
        """Calls of ``prefill.v1`` at the moment."""
        return self._calls.running + self._uploads.running

    def limit_of(self, method: str) -> CallLimit:
        """What the calls of a method of ``prefill.v1`` are counted by."""
        return self._uploads if method.endswith(f"/{UPLOAD}") else self._calls

    def note_change(self) -> None:
        """Calls have begun or ended."""
        if self.running:
            self._idle.clear()
        else:
            self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(details)
        if handler is None:
            return handler
        inner, make = _inner(handler)
        if details.method.startswith(_HEALTH):
            return make(
                _refuse_malformed(inner),
                request_deserializer=tolerant(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )

        async def unary(request: Any, context: Context) -> Any:
            async with _Call(self, details, context) as call:
                response = await inner(call.check_requests(request, handler), context)
                call.note_ids(response)
                return response

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with _Call(self, details, context) as call:
                responses = inner(call.check_requests(request, handler), context)
                first = True
                async with aclosing(responses):
                    async for response in responses:
                        if first:
                            call.note_ids(response)
                        first = False
                        yield response

        return make(
            stream if handler.response_streaming else unary,
            request_deserializer=tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _inner(handler: Any) -> tuple[Any, Any]:
    kinds = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }
    return kinds[handler.request_streaming, handler.response_streaming]


def _refuse_malformed(inner: Any) -> Any:
    """The handler of a health check, a coroutine also where it streams, with parsed requests."""

    async def checked(request: Any, context: Context) -> Any:
        if isinstance(request, MalformedRequest):
            await abort(context, request.error)
        return await inner(request, context)

    return checked


class _Call:
    """One call, from admission to its log line."""

    def __init__(
        self,
        owner: CallInterceptor,
        details: grpc.HandlerCallDetails,
        context: Context,
    ) -> None:
        self._owner = owner
        self._method: str = details.method
        self._metadata = details.invocation_metadata
        self._context = context
        self._ours = self._method.startswith(_OURS)
        self._limit = owner.limit_of(self._method)
        self._peer = address_of(context.peer())
        self._ids: dict[str, str] = {}
        self._started = time.monotonic()
        self._forget_task: Callable[[], None] = lambda: None

    async def __aenter__(self) -> _Call:
        if self._ours:
            task = asyncio.current_task()
            assert task is not None
            self._forget_task = self._owner.note_task(task)
            self._limit.enter(self._peer)
            self._owner.note_change()
        try:
            self._admit()
        except ServiceError as error:
            await self.__aexit__(type(error), error, None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ours:
            self._forget_task()
            self._limit.leave(self._peer)
            self._owner.note_change()
        if error is None:
            self._log("OK")
        elif isinstance(error, asyncio.CancelledError) and self._owner.cut_off:
            ended = ServiceError(Reason.SHUTTING_DOWN, "the service has shut down; ask again later")
            self._log(ended.status, str(ended))
            await abort(self._context, ended, self._ids.get("request_id", ""))
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= 0
            self._log("DEADLINE_EXCEEDED" if late else "CANCELLED")
        else:
            service_error = self._as_service_error(error)
            self._log(service_error.status, str(service_error))
            await abort(self._context, service_error, self._ids.get("request_id", ""))

    def note_ids(self, message: Any) -> None:
        """Keep the ids in a message for the log; what is too long for one is none."""
        places = [message, getattr(message, "progress", None)]  # an AskResponse has its job there
        places += [getattr(place, name, None) for place in places[:] for name in _HOLDERS]
        for place in places:
            for name in _ID_FIELDS:
                value = getattr(place, name, "")
                if value and len(value) <= _ID_CHARACTERS:
                    self._ids.setdefault(name, value)

    def check_requests(self, request: Any, handler: Any) -> Any:
        """The request, or the stream of requests, each checked before it is passed on.

        Raises:
            ServiceError: INVALID_REQUEST, for one that cannot be parsed or exceeds its limits.
        """
        if not handler.request_streaming:
            self._check(request)
            return request
        return self._check_stream(request)

    async def _check_stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._check(request)
            yield request

    def _check(self, request: Any) -> None:
        if isinstance(request, MalformedRequest):
            raise request.error
        self.note_ids(request)
        if self._ours:
            check_request(request)

    def _admit(self) -> None:
        owner = self._owner
        if not owner.token.admits(str(dict(self._metadata).get("authorization", ""))):
            raise ServiceError(
                Reason.UNAUTHENTICATED,
                "the call carries no valid token; send metadata 'authorization: Bearer TOKEN'",
            )
        if not self._ours:
            return
        if owner.draining:
            raise ServiceError(Reason.SHUTTING_DOWN, "the service is shutting down")
        self._limit.check(self._peer)

    def _as_service_error(self, error: BaseException) -> ServiceError:
        if isinstance(error, ServiceError):
            return error
        error_id = uuid.uuid4().hex
        logger.error("%s failed, error id %s", self._method, error_id, exc_info=error)
        return ServiceError(
            Reason.INTERNAL,
            f"internal error; the server's log has it under id {error_id}",
            error_id=error_id,
        )

    def _log(self, code: str, text: str = "") -> None:
        if self._ours:
            method = self._method.removeprefix(_OURS)
            self._owner.metrics.record_call(method, code)
            ids = "".join(f" {name}={ascii(value)[1:-1]}" for name, value in self._ids.items())
            elapsed_s = time.monotonic() - self._started
            text = f": {text}" if text else ""
            logger.info("%s %s %.3f s%s%s", method, code, elapsed_s, ids, text)
