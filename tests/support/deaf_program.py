"""A worker that a fork server has forked, and that never reads what it is sent.

Started as the workers' module is: ``--fork-server FD``.
"""

from __future__ import annotations

import signal
import socket
import sys
from typing import NoReturn

from prefill_service.engine.processes.fork_server import serve_forks


def run(descriptor: int) -> NoReturn:
    while True:
        signal.pause()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as control:
        serve_forks(control, run)
