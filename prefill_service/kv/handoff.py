"""Messages between a rank's page server and a consumer, and the hand-off parameters.

One Unix stream socket per consumer and rank. Each message is one JSON object on one line.

    -> {"op": "open", "prefix_id": ..., "generation": ..., "lease_id": ...}
    <- {"ok": true, "segment_bytes": n}             and, as SCM_RIGHTS, the shared memory's memfd
    -> {"op": "pages", "first": i, "count": n}
    <- {"ok": true, "checksums": [xxh3_64 of each page's bytes, as integers]}

``pages`` blocks until the pages are complete, so a consumer may ask while later chunks are
being computed. Errors are ``{"ok": false, "reason": ..., "message": ..., "metadata": {}}``
(``ServiceError.to_dict``) and end the connection. The consumer maps the shared memory read-only,
copies pages out, and compares checksums before it publishes anything.

When a load has ended, well or badly, the consumer sends one line to the service's report
socket, so that the service can name the cause of a failed answer:

    -> {"lease_id": ..., "ok": bool, "tokens": n, "bytes": n, "seconds": s, "error": {...} | null}

While vLLM takes in a long question, or lets one wait for others, it says how far it is:

    -> {"lease_id": ..., "computed_tokens": n, "prompt_tokens": n}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefill_service.kv.manifest import Manifest

PARAMS_KEY = "prefill_service"
"""Key of our entry in vLLM's ``kv_transfer_params``."""

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LeasedPages:
    """A prefix's pages, and the lease to read them under."""

    manifest: Manifest
    lease_id: str


@dataclass(frozen=True, slots=True)
class HandoffParams:
    """What the connector is told about one request.

    Attributes:
        manifest: of the longest prefix that is handed over.
        lease_id: to read its pages under, and to report under.
        report_to: ``unix:/path`` of the service's report socket, or empty.
        base: the prefix that has the tokens before ``manifest.start_token``.
    """

    manifest: Manifest
    lease_id: str
    report_to: str
    base: LeasedPages | None = None

    @property
    def parts(self) -> tuple[LeasedPages, ...]:
        """All pages that are handed over, in token order."""
        last = LeasedPages(self.manifest, self.lease_id)
        return (last,) if self.base is None else (self.base, last)

    def to_kv_transfer_params(self) -> dict[str, Any]:
        """The value of vLLM's ``kv_transfer_params``."""
        entry: dict[str, Any] = {
            "manifest": self.manifest.to_json(),
            "lease_id": self.lease_id,
            "report_to": self.report_to,
        }
        if self.base is not None:
            entry["base"] = {
                "manifest": self.base.manifest.to_json(),
                "lease_id": self.base.lease_id,
            }
        return {PARAMS_KEY: entry}

    @classmethod
    def from_kv_transfer_params(cls, params: dict[str, Any] | None) -> HandoffParams | None:
        """The inverse; ``None`` if the request is not one of ours.

        Raises:
            ValueError: our entry is there and malformed.
        """
        entry = (params or {}).get(PARAMS_KEY)
        if entry is None:
            return None
        try:
            manifest = Manifest.from_json(entry["manifest"])
            base = None
            if found := entry.get("base"):
                base = LeasedPages(Manifest.from_json(found["manifest"]), found["lease_id"])
            before = 0 if base is None else base.manifest.num_tokens
            if manifest.start_token != before:
                raise ValueError(
                    f"the manifest begins at token {manifest.start_token}, the one before it "
                    f"ends at {before}"
                )
            return cls(manifest, entry["lease_id"], entry["report_to"], base)
        except (KeyError, TypeError) as error:
            raise ValueError(f"malformed {PARAMS_KEY} entry: {error!r}") from error


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """Outcome of one load, sent by a vLLM worker to the service."""

    lease_id: str
    ok: bool
    tokens: int
    bytes: int
    seconds: float
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class IntakeReport:
    """How much of a prompt vLLM has computed or loaded, sent about once a second by its scheduler.

    Steps that compute nothing send none, so that each report is a sign of life.
    """

    lease_id: str
    computed_tokens: int
    prompt_tokens: int
