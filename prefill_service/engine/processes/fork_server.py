"""A process with torch and transformers imported, of which the workers on CPUs are copies.

The imports take most of a worker's start. They are done once for all ranks and all epochs, and
what they leave in memory is shared. CUDA does not survive a fork, so on GPUs every worker has an
interpreter of its own.

It imports nothing but the standard library; whoever calls ``serve_forks`` has imported the rest.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from prefill_service.parent_death import die_with_parent

MODULE = "prefill_service.engine.worker"
FORK_SERVER = "--fork-server"
"""Argument before the descriptor with which the module is the fork server, not a worker."""

_MESSAGE_BYTES = 1 << 20


class ForkedProcess:
    """A process that the fork server forks; it may not be there yet. Any thread may call it.

    Attributes:
        pid: 0 until it is forked.
    """

    def __init__(self) -> None:
        self.pid = 0
        self._descriptor = -1
        self._code: int | None = None
        self._killed = False
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process lives."""
        return self._code

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code, negative for a signal."""
        self._ended.wait()
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        """SIGKILL, at the latest when it is forked."""
        with self._lock:
            self._killed = True
            if self._descriptor >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def note_fork(self, pid: int, descriptor: int) -> None:
        """Take the id and the descriptor of the process, which is closed with its end."""
        with self._lock:
            self._descriptor = descriptor
            self.pid = pid
        if self._killed:
            self.kill()

    def note_end(self, code: int) -> None:
        """Wake those who wait."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
            self._code = code
        self._ended.set()


class ForkServer:
    """The front end's handle on the fork server, which starts with the first fork.

    When it dies its workers die with it; the next fork starts another one.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._forked: dict[int, ForkedProcess] = {}
        self._count = 0
        self._lock = threading.Lock()

    def fork(self, descriptor: int, environment: dict[str, str]) -> ForkedProcess:
        """Start a worker at the other end of a socket pair; returns before it runs.

        Args:
            descriptor: the worker's end of the pair, which may be closed afterwards.
            environment: of the worker. Number of threads and sizes of caches are those of the
                first worker, because libraries read them when they are loaded.

        Raises:
            OSError: there are no processes, descriptors or memory left.
        """
        with self._lock:
            if self._server is None or self._server.poll() is not None:
                self._start_server(environment)
            assert self._control is not None
            self._count += 1
            process = self._forked[self._count] = ForkedProcess()
            message = json.dumps({"number": self._count, "environment": environment}).encode()
            socket.send_fds(self._control, [message], [descriptor])
        return process

    def close(self) -> None:
        """End the server, and with it every worker that still runs."""
        server = self._server
        if server is not None:
            server.kill()
            server.wait()

    def _start_server(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                server = subprocess.Popen(
                    [sys.executable, "-m", MODULE, FORK_SERVER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
            except BaseException:
                ours.close()
                raise
        self._server = server
        self._control = ours
        self._forked = {}
        threading.Thread(
            target=_follow, args=(server, ours, self._forked), name="fork-server", daemon=True
        ).start()


def _follow(
    server: subprocess.Popen[bytes], control: socket.socket, forked: dict[int, ForkedProcess]
) -> None:
    """Note forks and ends until the server has ended, and with it all that it forked."""
    with control:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
            except OSError:
                break
            if not data:
                break
            notice = json.loads(data)
            number = notice["number"]
            if "code" in notice:
                forked.pop(number).note_end(notice["code"])
            else:
                forked[number].note_fork(notice["pid"], descriptors[0])
    code = server.wait()
    for process in list(forked.values()):
        process.note_end(code)


def serve_forks(control: socket.socket, run: Callable[[int], NoReturn]) -> None:
    """Fork a worker for each request, and report its end, until the front end is gone.

    Args:
        control: to the front end.
        run: what a worker does with its end of a socket pair.
    """
    gc.collect()
    gc.freeze()  # what is imported stays where it is, in pages that all workers share
    living: dict[int, tuple[int, int]] = {}  # descriptor of a process: its number and id
    with contextlib.suppress(BrokenPipeError), selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in living:
                    number, pid = living.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    control.send(json.dumps({"number": number, "code": code}).encode())
                    continue
                data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
                if not data:
                    return
                request = json.loads(data)
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    for other in living:
                        os.close(other)
                    selector.close()
                    control.close()
                    _become_worker(parent, request["environment"], partial(run, descriptors[0]))
                os.close(descriptors[0])
                process = os.pidfd_open(pid)
                living[process] = request["number"], pid
                selector.register(process, selectors.EVENT_READ)
                message = json.dumps({"number": request["number"], "pid": pid}).encode()
                socket.send_fds(control, [message], [process])


def _become_worker(
    parent: int, environment: dict[str, str], run: Callable[[], NoReturn]
) -> NoReturn:
    try:
        die_with_parent(parent)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # TMPDIR is another
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
