"""Sizes and tokens of pages."""

from __future__ import annotations

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.paging import DEFAULT_PAGE, MAX_PAGE, check_page


@pytest.mark.parametrize("clamp", [False, True])
def test_pages_that_are_accepted(clamp: bool) -> None:
    count, newest = check_page(0, "", clamp=clamp)
    assert count == DEFAULT_PAGE
    assert newest > int("9" * 18)
    assert check_page(MAX_PAGE, "17", clamp=clamp) == (MAX_PAGE, 17)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(
    ("size", "token"), [(-1, ""), (1, "x"), (1, "-1"), (1, "1" * 19), (1, "1" * 5000)]
)
def test_pages_that_are_refused(size: int, token: str, clamp: bool) -> None:
    with pytest.raises(ServiceError) as caught:
        check_page(size, token, clamp=clamp)
    assert caught.value.reason == Reason.INVALID_REQUEST
    assert caught.value.metadata["name"] == ("page_token" if token else "page_size")


def test_a_size_above_the_maximum_is_clamped_or_refused() -> None:
    assert check_page(MAX_PAGE + 1, "", clamp=True)[0] == MAX_PAGE
    with pytest.raises(ServiceError, match=str(MAX_PAGE)):
        check_page(MAX_PAGE + 1, "", clamp=False)
