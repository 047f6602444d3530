"""vLLM's OpenAI server, a child of the service.

Started as ``python -m prefill_service.generation.vllm_server``.

vLLM spawns EngineCore and workers, and spawn runs this module's top level again in each of
them. So every process of vLLM asks the kernel to be killed with its parent: however the
service or the API server dies, nothing lingers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from prefill_service.generation.load_format import DEQUANTIZE

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent process ends."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # It may have ended before the call; the service passes its pid to its own child.
    expected = os.environ.pop("PREFILL_SERVICE_PARENT_PID", "")
    if expected and os.getppid() != int(expected):
        os._exit(1)


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    if DEQUANTIZE in sys.argv:  # spawn hands the arguments to every child
        import prefill_service.generation.fp8_loader  # noqa: F401 (registers the format)

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()  # type: ignore[no-untyped-call]
