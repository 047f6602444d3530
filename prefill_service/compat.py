"""Work-arounds for packages that do not fit together as they come from their indexes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work when PyPI's CUDA-built wheel meets a CPU-only torch.

    The wheel's operator library needs ``libtorch_cuda.so``; without it nothing declares the
    operators, and registering their fake kernels fails the import. Declaring the two schemas
    first is enough: ``torchvision.transforms``, all that video processors use, is plain
    torch. Operators (``nms``, ``roi_align``, image decoders) stay unavailable.

    This is also our ``torch.backends`` entry point, which torch calls at the end of its own
    import: vLLM imports torchvision in processes of its own before it loads any plugin.
    Idempotent; does nothing where torch has CUDA or torchvision is built for the CPU.
    """
    import torch

    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    if "+cu" not in Path(spec.origin).with_name("version.py").read_text():
        return
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)
