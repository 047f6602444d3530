"""Units: the same on any number of ranks, and shares that cut none."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import deal_patches


@pytest.mark.parametrize("patches", [1, 7, 33, 100, 641])
@pytest.mark.parametrize("patch_tokens", [3, 16, 130, 700])
@pytest.mark.parametrize("chunk_tokens", [50, 512, 4096])
def test_shares_are_whole_units(patches: int, patch_tokens: int, chunk_tokens: int) -> None:
    ends = 5 + np.arange(1, patches + 1) * patch_tokens
    units = SelectionUnits.of(ends, chunk_tokens)
    assert (units.patches[0], units.patches[-1]) == (0, patches)
    assert (units.tokens[0], units.tokens[-1]) == (0, ends[-1])
    assert units.tokens[1:] == tuple(ends[np.array(units.patches[1:]) - 1])
    for ranks in (1, 2, 3, 4, 7):
        layout = deal_patches(ends, ranks, chunk_tokens, whole_units=True)
        found = []
        for chunk in layout.shares:
            for share in chunk:
                found += units.cut(*share.contiguous)
        assert [start for start, _ in found] == list(units.tokens[:-1])
        # Only the last chunk is dealt in another way than by patches.
        by_patch = deal_patches(ends, ranks, chunk_tokens)
        assert layout.shares[:-1] == by_patch.shares[:-1]
        largest, even = (
            max(share.num_tokens for share in shares[-1])
            for shares in (layout.shares, by_patch.shares)
        )
        assert largest <= even + max(np.diff(units.tokens))


def test_units_towards_the_end_are_cut_in_parts() -> None:
    units = SelectionUnits.of(np.arange(1, 1001) * 16, 512)
    sizes = np.diff(units.tokens)
    assert (sizes[:28] == 512).all()
    assert (sizes[28:34] == 256).all()
    assert (
        SelectionUnits.of(np.arange(1, 1001) * 16, 200).tokens[-2] == 83 * 192
    )  # too short to be cut


def test_a_range_is_cut_where_units_begin() -> None:
    units = SelectionUnits((0, 2, 4, 5), (0, 20, 40, 50))
    assert units.cut(5, 45) == [(5, 20), (20, 40), (40, 45)]
    assert units.cut(20, 40) == [(20, 40)]
    assert units.cut(7, 7) == []
