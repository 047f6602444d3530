"""The manifest: what a video prefix's KV cache is and where its shards lie.

The manifest is the contract between the ranks, which compute KV, and the connector inside
vLLM, which pulls it. It is known *before* the prefill starts (the plan fixes which rank
computes which tokens), so that vLLM can be asked while chunks are still being computed;
per-page checksums travel with the pages (``kv.handoff``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np

from prefill_service.attention_shape import KVShape, require_sizes

MANIFEST_VERSION = 1

_JSON_KEYS = {"epoch": "generation", "attention_key": "profile"}
"""Fields that have another name in JSON, which clients and the database keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout(KVShape):
    """Shape of one page: ``[num_layers, 2 (K, V), page_tokens, kv_heads, head_dim]``.

    K is stored after rotary embedding, as every paged cache stores it.

    Raises:
        ValueError: a size below 1, or an unknown dtype.
    """

    page_tokens: int = 64

    def __post_init__(self) -> None:
        KVShape.__post_init__(self)
        require_sizes(self, "num_layers", "kv_heads", "head_dim", "page_tokens")

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """Elements of one page, outermost first."""
        return (self.num_layers, 2, self.page_tokens, self.kv_heads, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_tokens * self.token_bytes

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed for a run of ``num_tokens`` that starts on a fresh page."""
        return ceil(num_tokens / self.page_tokens)

    def to_dict(self) -> dict[str, Any]:
        """A layout as a manifest's JSON has it, which calls ``kv_heads`` ``num_kv_heads``."""
        data = asdict(self)
        return {{"kv_heads": "num_kv_heads"}.get(name, name): data[name] for name in data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVLayout:
        """Parse what ``to_dict`` made.

        Raises:
            KeyError, TypeError: an entry is missing, or unknown.
            ValueError: a size below 1, or an unknown dtype.
        """
        sizes = dict(data)
        return cls(kv_heads=sizes.pop("num_kv_heads"), **sizes)


@dataclass(frozen=True, slots=True)
class ShardRun:
    """Tokens ``[start_token, end_token)`` held by ``rank`` in its pages ``first_page`` onwards.

    Each run starts on a fresh page; its last page may be partly filled.
    """

    start_token: int
    end_token: int
    rank: int
    first_page: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a run: global tokens ``[start_token, start_token + num_tokens)``."""

    start_token: int
    num_tokens: int
    rank: int
    index: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A prefix's identity, layout and shard map.

    Attributes:
        prefix_id: content-derived id (model, video bytes, frames, positions, precision and
            ``attention_key``), so that equal ids mean equal KV.
        engine_id: uuid of the service that computed it.
        epoch: number of the workers' start; pages of an older epoch are gone.
        model_fingerprint: hash of the configuration and weights.
        layout: shape of a page.
        num_tokens: tokens of the prefix.
        runs: shard map, ascending, without gaps.
        endpoints: per rank, where its pages are served (``unix:/path``).
        token_ids_hash: ``hash_token_ids`` of the prefix; the consumer compares it with the
            prompt it was given.
        position_delta: M-RoPE position of the next token minus its index.
        attention_key: how attention was computed: ``"exact"``, or the name and figures of an
            approximation.
        start_token: where its runs begin: after the tokens of another prefix, which it extends,
            or at 0.
    """

    prefix_id: str
    engine_id: str
    epoch: int
    model_fingerprint: str
    layout: KVLayout
    num_tokens: int
    runs: tuple[ShardRun, ...]
    endpoints: tuple[str, ...]
    token_ids_hash: str
    position_delta: int
    attention_key: str = "exact"
    start_token: int = 0
    version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        expected = self.start_token
        for run in self.runs:
            if run.start_token != expected or run.end_token <= run.start_token:
                raise ValueError(
                    f"shard map is not contiguous: run {run} should start at token {expected}"
                )
            if not 0 <= run.rank < len(self.endpoints):
                raise ValueError(f"run {run} names rank {run.rank} of {len(self.endpoints)}")
            expected = run.end_token
        if expected != self.num_tokens:
            raise ValueError(f"shard map covers {expected} of {self.num_tokens} tokens")

    def pages(self, start_token: int = 0, end_token: int | None = None) -> Iterator[Page]:
        """Pages that hold any token of ``[start_token, end_token)``, in token order."""
        end_token = self.num_tokens if end_token is None else end_token
        size = self.layout.page_tokens
        for run in self.runs:
            if run.end_token <= start_token or run.start_token >= end_token:
                continue
            first = max(0, start_token - run.start_token) // size
            last = (min(run.end_token, end_token) - run.start_token - 1) // size
            for i in range(first, last + 1):
                begin = run.start_token + i * size
                yield Page(begin, min(size, run.end_token - begin), run.rank, run.first_page + i)

    def to_json(self) -> str:
        """Compact JSON; ``from_json`` is the inverse.

        A prefix of its own has no start, so that connectors that know no extensions read it.
        """
        data = asdict(self)
        if not self.start_token:
            del data["start_token"]
        data["layout"] = self.layout.to_dict()
        data["runs"] = [[r.start_token, r.end_token, r.rank, r.first_page] for r in self.runs]
        data = {_JSON_KEYS.get(name, name): value for name, value in data.items()}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what ``to_json`` wrote.

        Raises:
            ValueError: wrong version, missing field, or a shard map with gaps.
        """
        try:
            data = json.loads(text)
            if data["version"] != MANIFEST_VERSION:
                raise ValueError(
                    f"manifest version {data['version']}, this build reads {MANIFEST_VERSION}"
                )
            data["layout"] = KVLayout.from_dict(data["layout"])
            data["runs"] = tuple(ShardRun(*run) for run in data["runs"])
            data["endpoints"] = tuple(data["endpoints"])
            for name, key in _JSON_KEYS.items():
                data[name] = data.pop(key)
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"malformed manifest: {error!r}") from error


def hash_token_ids(token_ids: Sequence[int] | np.ndarray) -> str:
    """sha256 over the ids as little-endian int32."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()
