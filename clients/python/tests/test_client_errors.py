from __future__ import annotations

import grpc
import pytest
from client_helpers import Api
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

import prefill_client
from prefill_client import _details, errors


def packed(*details: object, code: int = 5) -> bytes:
    status = status_pb2.Status(code=code, message="no such video")
    for detail in details:
        any_message = any_pb2.Any()
        any_message.Pack(detail)
        status.details.append(any_message)
    return status.SerializeToString()


def test_details_of_the_real_messages_are_read():
    info = error_details_pb2.ErrorInfo(
        reason="UNKNOWN_VIDEO", domain="prefill-service", metadata={"video_id": "vid_1", "é": "ü"}
    )
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    details = _details.decode_details(
        packed(
            error_details_pb2.Help(),
            info,
            retry,
            error_details_pb2.RequestInfo(request_id="abc", serving_data="x"),
        )
    )
    assert details == _details.ErrorDetails(
        "UNKNOWN_VIDEO", "prefill-service", {"video_id": "vid_1", "é": "ü"}, 1.5, "abc"
    )


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"not a status", packed()[:-3]])
def test_malformed_details_are_empty(data):
    assert _details.decode_details(data) == _details.ErrorDetails()


def test_reason_table_covers_the_server():
    # The one test that looks at the server's code: its reasons are the API's.
    reasons = pytest.importorskip("prefill_service.errors", reason="server not installed").Reason
    for reason in reasons:
        assert type(errors.make_error(str(reason), "")) is not errors.PrefillError, reason


def test_reasons_belong_to_one_family():
    families = errors._FAMILIES
    assert len(errors._BY_REASON) == sum(len(family.reasons) for family in families)
    assert len(errors._BY_CODE) == sum(len(family.codes) for family in families)
    for name in errors._BY_CODE:
        assert name in grpc.StatusCode.__members__
    for family in families:
        assert getattr(prefill_client, family.__name__) is family


def test_unknown_reason_gives_the_base_class():
    error = errors.make_error("FROM_THE_FUTURE", "no idea")
    assert type(error) is errors.PrefillError
    assert str(error) == "no idea [FROM_THE_FUTURE]"


async def test_error_of_a_call(api: Api):
    with pytest.raises(errors.NotFoundError) as caught:
        await api.call("video", "vid_none")
    error = caught.value
    assert error.reason == "UNKNOWN_VIDEO"
    assert error.message == "no video 'vid_none'"
    assert error.metadata == {"video_id": "vid_none"}
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert error.request_id == "server-UNKNOWN_VIDEO"
    with pytest.raises(errors.PermissionDeniedError, match="outside the import roots"):
        await api.call("import_video", "/etc/passwd")
