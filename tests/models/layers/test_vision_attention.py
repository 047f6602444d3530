"""The vision tower's attention and patch embedding against the plain way, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from prefill_service.models.layers.vision_attention import PatchProduct, varlen_attention


@pytest.mark.parametrize("lengths", [[6, 6, 6], [5], [4, 6, 4, 1, 6], [0, 3, 3]])
def test_runs_attend_within_themselves(lengths: list[int]) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    # As the tower has them: views of one fused projection.
    q, k, v = torch.randn(tokens, 3, 2, 8, dtype=torch.float64).permute(1, 2, 0, 3)[:, None]
    got, _ = varlen_attention(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=torch.tensor(borders))
    assert got.shape == (1, tokens, 2, 8)
    for start, end in pairwise(borders):
        one = slice(start, end)
        p = torch.softmax(q[0, :, one] @ k[0, :, one].transpose(1, 2) * 0.3, -1)
        torch.testing.assert_close(got[0, one], (p @ v[0, :, one]).transpose(0, 1))


@pytest.mark.parametrize("bias", [False, True])
def test_patch_product_is_the_convolution(bias: bool) -> None:
    torch.manual_seed(1)
    conv = nn.Conv3d(3, 10, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    patches = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64)
    product = PatchProduct(conv)
    torch.testing.assert_close(product(patches), conv(patches).view(-1, 10))


def test_other_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="no product over whole patches"):
        PatchProduct(nn.Conv3d(3, 10, kernel_size=(2, 4, 4), stride=(2, 2, 4)))
