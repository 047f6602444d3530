"""Which back end computes sparse attention."""

from __future__ import annotations

import torch

from prefill_service.attention.sparse.cpu_backend import CpuBackend
from prefill_service.attention.sparse.cuda_backend import CudaBackend
from prefill_service.attention.sparse.problem import SparseBackend


def make_backend(device: torch.device) -> SparseBackend:
    """Triton kernels on CUDA; elsewhere gathered blocks."""
    return CudaBackend() if device.type == "cuda" else CpuBackend()
