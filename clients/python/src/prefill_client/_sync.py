"""Executes flows over a blocking channel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import grpc

from prefill_client._channel import Endpoint, rpc_table
from prefill_client._steps import (
    Action,
    Blocking,
    Call,
    Emit,
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


class Cancellation:
    """Lets another thread end the call that a flow is in, and the flow with it."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._call: Any = None

    def attach(self, call: Any) -> None:
        """Set the call that ``cancel`` ends; ends it at once if that was asked for before."""
        self._call = call
        if self.requested.is_set():
            call.cancel()

    def cancel(self) -> None:
        """Cancel, at the server too. Safe from any thread; a second call has no effect."""
        self.requested.set()
        if self._call is not None:
            self._call.cancel()


class SyncDriver:
    """Runs flows on the caller's thread. One may be used by several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = endpoint.make_channel(grpc)
        self._metadata = endpoint.metadata
        self._rpcs = rpc_table(self._channel)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def run(self, flow: Flow[T]) -> T:
        """Run a flow that emits nothing to its end."""
        driven = self._drive(flow, Cancellation())
        while True:
            try:
                next(driven)
            except StopIteration as stop:
                result: T = stop.value
                return result

    def iterate(self, flow: Flow[Any], cancellation: Cancellation | None = None) -> Iterator[Any]:
        """Iterate over what a flow emits; it runs only while it is iterated over."""
        return self._drive(flow, cancellation or Cancellation())

    def _drive(self, flow: Flow[T], cancellation: Cancellation) -> Flow[T]:
        try:
            step = next(flow)
            while True:
                result = None
                failure = None
                if isinstance(step, Emit):
                    yield step.value
                else:
                    try:
                        result = self._execute(step, cancellation)
                    except (PrefillError, OSError) as error:
                        failure = error
                step = flow.send(result) if failure is None else flow.throw(failure)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            flow.close()
            cancellation.cancel()  # whatever is still open: the caller has gone away

    def _execute(self, step: Action, cancellation: Cancellation) -> Any:
        if cancellation.requested.is_set():
            raise _cancelled()
        if isinstance(step, Sleep):
            cancellation.requested.wait(step.seconds)
            return None
        if isinstance(step, Blocking):
            return step.function()
        try:
            if isinstance(step, Call):
                rpc = self._rpcs[step.rpc]
                return rpc(step.request, timeout=step.timeout, metadata=self._metadata)
            if isinstance(step, Open):
                rpc = self._rpcs[step.rpc]
                call = rpc(step.request, timeout=step.timeout, metadata=self._metadata)
                cancellation.attach(call)
                return Stream(call, step.request)
            if isinstance(step, Next):
                return next(step.stream.call, None)
            return self._send(step, cancellation)
        except grpc.RpcError as error:
            raise from_rpc_error(error, getattr(step.request, "request_id", "")) from error

    def _send(self, step: Send, cancellation: Cancellation) -> Any:
        requests = iter(step.chunks.read, None)
        future = self._rpcs["UploadChunks"].future(requests, metadata=self._metadata)
        cancellation.attach(future)
        try:
            while True:
                try:
                    return future.result(timeout=_POLL_S)
                except grpc.FutureTimeoutError:
                    step.report(step.chunks.offset)
                except grpc.FutureCancelledError:
                    raise _cancelled() from None
        finally:
            future.cancel()  # without effect if it has ended
            step.chunks.close()
            if step.chunks.error is not None:
                raise step.chunks.error


def _cancelled() -> PrefillError:
    return make_error("CANCELLED", "cancelled by the caller", code=grpc.StatusCode.CANCELLED)
