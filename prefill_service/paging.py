"""Pages of a list, newest first: what a caller may ask for."""

from __future__ import annotations

import re

from prefill_service.errors import Reason, ServiceError

DEFAULT_PAGE = 50
MAX_PAGE = 1000
PAGE_TOKEN = re.compile("[0-9]{1,18}")
_NEWEST = 1 << 62


def check_page(page_size: int, page_token: str) -> tuple[int, int]:
    """The number of entries of a page, and the sequence number before which it starts.

    Args:
        page_size: 0 means ``DEFAULT_PAGE``, and more than ``MAX_PAGE`` means that (AIP-158).
        page_token: the one that came with the page before; "" for the first page.

    Raises:
        ServiceError: INVALID_REQUEST for a bad size or token.
    """
    if page_size < 0:
        raise _invalid("page_size", page_size, f"0 (for {DEFAULT_PAGE}) or more")
    if page_token and not PAGE_TOKEN.fullmatch(page_token):
        raise _invalid("page_token", page_token, "the next_page_token of a page before")
    return min(page_size or DEFAULT_PAGE, MAX_PAGE), int(page_token or _NEWEST)


def _invalid(name: str, value: object, accepted: str) -> ServiceError:
    return ServiceError(
        Reason.INVALID_REQUEST,
        f"{name} = {value!r} is not accepted; expected {accepted}",
        name=name,
        value=value,
        accepted=accepted,
    )
