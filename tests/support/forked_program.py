"""What a fork server's children run in tests: they say where they are, and exit as they are told.

Started as the workers' module is: ``--fork-server FD``.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from typing import NoReturn

from prefill_service.engine.processes.fork_server import serve_forks


def run(descriptor: int) -> NoReturn:
    with socket.socket(fileno=descriptor) as pipe:
        pipe.send(f"{tempfile.gettempdir()} {os.getppid()} {os.getpid()}".encode())
        os._exit(pipe.recv(1)[0])


if __name__ == "__main__":
    tempfile.gettempdir()  # known before the fork, as an import may have it
    with socket.socket(fileno=int(sys.argv[2])) as control:
        serve_forks(control, run)
