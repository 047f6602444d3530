"""Work-arounds for packages that do not fit together as they come from their indexes."""

from __future__ import annotations


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work when PyPI's CUDA-built wheel meets a CPU-only torch.

    The wheel's operator library needs ``libtorch_cuda.so``; without it nothing declares the
    operators, and registering their fake kernels fails the import. Declaring the two schemas
    is enough: ``torchvision.transforms``, all that video processors use, is plain torch.
    Operators (``nms``, ``roi_align``, image decoders) stay unavailable.

    Idempotent. Also the ``vllm.general_plugins`` entry point, by which every process of vLLM
    calls it.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it fails to import for another reason.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return
    import torch

    # The definitions live as long as the Library object; the module keeps it.
    _schemas.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _schemas[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


_schemas: list[object] = []
