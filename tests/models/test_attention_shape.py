"""Names and sizes of dtypes are torch's."""

from __future__ import annotations

import pytest
import torch

from prefill_service.attention_shape import (
    DTYPE_BYTES,
    KVShape,
    accumulation_dtype,
    dtype_name,
)


@pytest.mark.parametrize("name", DTYPE_BYTES)
def test_dtypes_have_torch_s_sizes(name: str) -> None:
    shape = KVShape(num_layers=3, kv_heads=2, head_dim=8, dtype=name)
    assert shape.bytes_per_element == shape.torch_dtype.itemsize
    assert dtype_name(shape.torch_dtype) == name
    assert shape.token_bytes == 3 * 2 * 2 * 8 * shape.torch_dtype.itemsize
    wide = accumulation_dtype(shape.torch_dtype)
    assert wide == (torch.float64 if name == "float64" else torch.float32)
