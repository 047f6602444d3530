"""Executes flows over an asyncio channel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import grpc
import grpc.aio

from prefill_client._channel import Endpoint, rpc_table
from prefill_client._steps import (
    Action,
    Blocking,
    Call,
    Emit,
    FileChunks,
    Flow,
    Next,
    Open,
    Send,
    Sleep,
    Stream,
)
from prefill_client.errors import PrefillError, from_rpc_error, make_error

T = TypeVar("T")
_POLL_S = 0.1


class AsyncCancellation:
    """Lets another task end the call that a flow is in, and the flow with it."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._call: Any = None

    def attach(self, call: Any) -> None:
        """Set the call that ``cancel`` ends; ends it at once if that was asked for before."""
        self._call = call
        if self.requested.is_set():
            call.cancel()

    def cancel(self) -> None:
        """Cancel, at the server too. A second call has no effect."""
        self.requested.set()
        if self._call is not None:
            self._call.cancel()


class AsyncDriver:
    """Runs flows on the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: Any = None
        self._rpcs: dict[str, Any] = {}

    def _rpc(self, name: str) -> Any:
        # A grpc.aio channel belongs to the loop that is running when it is made.
        if self._channel is None:
            self._channel = self._endpoint.make_channel(grpc.aio)
            self._rpcs = rpc_table(self._channel)
        return self._rpcs[name]

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow that emits nothing to its end."""
        result: list[T] = []
        async for _ in self._drive(flow, AsyncCancellation(), result):
            pass
        return result[0]

    def iterate(
        self, flow: Flow[Any], cancellation: AsyncCancellation | None = None
    ) -> AsyncGenerator[Any, None]:
        """Iterate over what a flow emits; it runs only while it is iterated over."""
        return self._drive(flow, cancellation or AsyncCancellation(), [])

    async def _drive(
        self, flow: Flow[T], cancellation: AsyncCancellation, result: list[T]
    ) -> AsyncGenerator[Any, None]:
        try:
            step = next(flow)
            while True:
                value = None
                failure = None
                if isinstance(step, Emit):
                    yield step.value
                else:
                    try:
                        value = await self._execute(step, cancellation)
                    except (PrefillError, OSError) as error:
                        failure = error
                step = flow.send(value) if failure is None else flow.throw(failure)
        except StopIteration as stop:
            result.append(stop.value)
        finally:
            flow.close()
            cancellation.cancel()  # whatever is still open: the caller has gone away

    async def _execute(self, step: Action, cancellation: AsyncCancellation) -> Any:
        if cancellation.requested.is_set():
            raise _cancelled()
        if isinstance(step, Sleep):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cancellation.requested.wait(), step.seconds)
            return None
        if isinstance(step, Blocking):
            return await asyncio.to_thread(step.function)
        try:
            return await self._execute_rpc(step, cancellation)
        except grpc.RpcError as error:
            raise from_rpc_error(error, getattr(step.request, "request_id", "")) from error
        except asyncio.CancelledError:
            # grpc.aio raises this for a call cancelled here; only if it is not our own task
            # that is being cancelled is it a result.
            task = asyncio.current_task()
            if cancellation.requested.is_set() and not (task and task.cancelling()):
                raise _cancelled() from None
            raise

    async def _execute_rpc(
        self, step: Call | Open | Next | Send, cancellation: AsyncCancellation
    ) -> Any:
        metadata = self._endpoint.metadata
        if isinstance(step, Call):
            rpc = self._rpc(step.rpc)
            return await rpc(step.request, timeout=step.timeout, metadata=metadata)
        if isinstance(step, Open):
            rpc = self._rpc(step.rpc)
            call = rpc(step.request, timeout=step.timeout, metadata=metadata)
            cancellation.attach(call)
            return Stream(call, step.request)
        if isinstance(step, Next):
            message = await step.stream.call.read()
            return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]
        return await self._send(step, cancellation)

    async def _send(self, step: Send, cancellation: AsyncCancellation) -> Any:
        call = self._rpc("UploadChunks")(_requests(step.chunks), metadata=self._endpoint.metadata)
        cancellation.attach(call)
        try:
            waiter = asyncio.ensure_future(_result(call))
            while not (await asyncio.wait({waiter}, timeout=_POLL_S))[0]:
                step.report(step.chunks.offset)
            return waiter.result()
        finally:
            call.cancel()  # without effect if it has ended
            await asyncio.to_thread(step.chunks.close)
            if step.chunks.error is not None:
                raise step.chunks.error


async def _requests(chunks: FileChunks) -> AsyncIterator[Any]:
    while (request := await asyncio.to_thread(chunks.read)) is not None:
        yield request


async def _result(call: Any) -> Any:
    return await call


def _cancelled() -> PrefillError:
    return make_error("CANCELLED", "cancelled by the caller", code=grpc.StatusCode.CANCELLED)
