"""Ids are unique, in order of time, and never a path."""

from __future__ import annotations

from prefill_service.ids import is_id, new_id


def test_new_ids() -> None:
    ids = [new_id("job") for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(len(each) == 30 and is_id("job", each) for each in ids)
    assert [each[:13] for each in ids] == sorted(each[:13] for each in ids)


def test_what_is_no_id() -> None:
    good = new_id("vid")
    assert is_id("vid", good)
    bad = ["", "vid_", good[:-1], good + "0", good + "\n", good[:-1] + "/", "../" + good, "vid_.."]
    assert not any(is_id("vid", each) for each in [*bad, new_id("job"), good.upper()])
