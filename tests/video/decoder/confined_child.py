"""What code in a decoder process can and cannot do: exits by SIGABRT if all is as it should be."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from prefill_service.video.decoder.sandbox.resource_limits import forgo_privileges
from prefill_service.video.decoder.sandbox.seccomp import confine_system_calls

LIBC = ctypes.CDLL(None, use_errno=True)
FORBIDDEN = {
    "setrlimit": (160, 7, 0),
    "tgkill": (234, os.getppid(), os.getppid(), 0),
    "prlimit64 of another": (302, os.getppid(), 7, 1 << 32, 0),
    "ptrace": (101, 0, 0, 0, 0),
    "unshare": (272, 0x10000000),
    "mount": (165, 0, 0, 0, 0, 0),
    "process_vm_readv": (310, os.getppid(), 0, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "keyctl": (250, 0, 0, 0, 0, 0),
    "userfaultfd": (323, 0),
    "io_uring_setup": (425, 8, 0),
    "clone3": (435, 0, 0),
}


def refused(action: Callable[[], object]) -> bool:
    """Whether the kernel says that this is not permitted, or that there is no such call."""
    try:
        action()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.ENOSYS)
    return False


def main() -> None:
    forgo_privileges()
    if not confine_system_calls():
        sys.exit(77)
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        assert refused(lambda family=family: socket.socket(family)), family
    assert refused(socket.socketpair)
    assert refused(os.fork)
    assert refused(lambda: os.execv("/bin/true", ["true"]))
    assert refused(lambda: subprocess.run(["/bin/true"]))
    assert refused(lambda: os.kill(os.getppid(), signal.SIGURG))
    for name, (number, *arguments) in FORBIDDEN.items():
        done = LIBC.syscall(number, *(ctypes.c_long(one) for one in arguments))
        assert done == -1, name
        assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS), name
    ran: list[int] = []
    thread = threading.Thread(target=lambda: ran.append(1))
    thread.start()
    thread.join()
    assert ran == [1]
    os.abort()


if __name__ == "__main__":
    main()
