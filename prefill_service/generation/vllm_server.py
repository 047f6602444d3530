"""vLLM's OpenAI server, a child of the service.

Started as ``python -m prefill_service.generation.vllm_server``.

vLLM spawns EngineCore and workers, and spawn runs this module's top level again in each of
them. So every process of vLLM asks the kernel to be killed with its parent: however the
service or the API server dies, nothing lingers.
"""

from __future__ import annotations

import os
import sys

from prefill_service.generation.load_format import DEQUANTIZE
from prefill_service.parent_death import die_with_parent

if __name__ in ("__main__", "__mp_main__"):
    # The service passes its pid to its own child; vLLM's children know none.
    expected = os.environ.pop("PREFILL_SERVICE_PARENT_PID", "")
    die_with_parent(int(expected) if expected else None)
    if DEQUANTIZE in sys.argv:  # spawn hands the arguments to every child
        import prefill_service.generation.fp8_loader  # noqa: F401 (registers the format)

if __name__ == "__main__":
    from prefill_service.compat import missing_imports, unsupported_vllm

    try:
        from vllm.entrypoints.launchers.api_server.entry import main
    except ImportError as error:
        raise unsupported_vllm(missing_imports(__file__), because=error) from error
    main()  # type: ignore[no-untyped-call]
