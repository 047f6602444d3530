"""Every reason has a status that gRPC knows and a line in the table of docs/api.md."""

from __future__ import annotations

import re
from pathlib import Path

import grpc

from prefill_service.errors import Reason, ServiceError

# They end a start of the service and reach no client.
LOCAL = {Reason.CONFIG_INVALID, Reason.PORT_IN_USE}


def test_documented_statuses_are_the_real_ones() -> None:
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    table = {}
    for status, reasons in re.findall(r"^\| `([A-Z_]+)` \| ((?:`[A-Z_]+` ?)+)\|", text, re.M):
        assert status in grpc.StatusCode.__members__
        table |= dict.fromkeys(re.findall(r"[A-Z_]+", reasons), status)
    assert table == {str(r): ServiceError(r, "").status for r in Reason if r not in LOCAL}


def test_an_error_survives_the_way_through_json() -> None:
    error = ServiceError(Reason.KV_CORRUPT, "page 3", page=3)
    copy = ServiceError.from_dict(error.to_dict())
    assert (copy.reason, copy.message, copy.metadata) == (
        Reason.KV_CORRUPT,
        "page 3",
        {"page": "3"},
    )
    assert ServiceError.from_dict({"reason": "NEW", "message": "m"}).reason is Reason.INTERNAL
