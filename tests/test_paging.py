"""Sizes and tokens of pages."""

from __future__ import annotations

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.paging import DEFAULT_PAGE, MAX_PAGE, check_page


def test_pages_that_are_accepted() -> None:
    count, newest = check_page(0, "")
    assert count == DEFAULT_PAGE
    assert newest > int("9" * 18)
    assert check_page(MAX_PAGE, "17") == (MAX_PAGE, 17)
    assert check_page(MAX_PAGE + 1, "")[0] == check_page(2**31 - 1, "")[0] == MAX_PAGE


@pytest.mark.parametrize(
    ("size", "token"), [(-1, ""), (1, "x"), (1, "-1"), (1, "1" * 19), (1, "1" * 5000)]
)
def test_pages_that_are_refused(size: int, token: str) -> None:
    with pytest.raises(ServiceError) as caught:
        check_page(size, token)
    assert caught.value.reason == Reason.INVALID_REQUEST
    assert caught.value.metadata["name"] == ("page_token" if token else "page_size")
