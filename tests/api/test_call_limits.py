"""Peers are told apart by address, whatever kind gRPC names."""

import pytest

from prefill_service.api.call_limits import CallLimit, address_of
from prefill_service.errors import ServiceError


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:[2001:db8::1]:5000", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_address_of_a_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address


def test_a_share_of_few_calls_is_rounded_up_and_calls_that_end_make_room() -> None:
    limit = CallLimit("calls", 2, peer_share=0.6)
    for peer in ("a", "a"):
        limit.enter(peer)
        limit.check(peer)
    limit.enter("b")
    with pytest.raises(ServiceError, match="2 calls are running"):
        limit.check("b")
    limit.leave("a")
    limit.check("b")
    limit.leave("a")
    limit.leave("b")
    assert limit.running == 0
