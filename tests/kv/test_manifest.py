"""The manifest's JSON is a format: services and connectors of other builds read it."""

from __future__ import annotations

import json

import pytest

from prefill_service.kv.manifest import KVLayout, Manifest, ShardRun

TEXT = (
    '{"prefix_id":"p","engine_id":"e","generation":3,"model_fingerprint":"f",'
    '"layout":{"num_layers":4,"num_kv_heads":2,"head_dim":64,"dtype":"bfloat16",'
    '"page_tokens":64},"num_tokens":100,"runs":[[0,70,0,0],[70,100,1,0]],'
    '"endpoints":["unix:/a","unix:/b"],"token_ids_hash":"h","position_delta":-7,'
    '"profile":"exact","version":1}'
)
MANIFEST = Manifest(
    prefix_id="p",
    engine_id="e",
    epoch=3,
    model_fingerprint="f",
    layout=KVLayout(num_layers=4, kv_heads=2, head_dim=64, dtype="bfloat16"),
    num_tokens=100,
    runs=(ShardRun(0, 70, 0, 0), ShardRun(70, 100, 1, 0)),
    endpoints=("unix:/a", "unix:/b"),
    token_ids_hash="h",
    position_delta=-7,
)


def test_what_version_1_looks_like() -> None:
    assert MANIFEST.to_json() == TEXT
    assert Manifest.from_json(TEXT) == MANIFEST
    assert MANIFEST.layout.page_bytes == 4 * 2 * 64 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "dtype = 'fp8'; expected one of float64, float32, "),
        ({"page_tokens": 0}, "page_tokens = 0; expected 1 or more"),
        ({"num_kv_heads": -2}, "kv_heads = -2; expected 1 or more"),
        ({"num_layers": "4"}, "malformed manifest"),
        ({"kv_heads": 2}, "malformed manifest"),
        ({"q_heads": 2}, "malformed manifest"),
    ],
)
def test_a_page_of_another_shape_is_refused(change: dict[str, object], message: str) -> None:
    data = json.loads(TEXT)
    data["layout"] |= change
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(json.dumps(data))


def test_a_layout_without_heads_is_refused() -> None:
    data = json.loads(TEXT)
    del data["layout"]["num_kv_heads"]
    with pytest.raises(ValueError, match="malformed manifest: KeyError"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["generation", "profile", "runs", "version"])
def test_a_manifest_without_a_key_is_malformed(key: str) -> None:
    data = json.loads(TEXT)
    del data[key]
    with pytest.raises(ValueError, match=key):
        Manifest.from_json(json.dumps(data))
