"""The block on versions: which combinations of packages the tests have run with."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.report.results import rows

_PACKAGES = ("vllm", "transformers", "torch", "protobuf", "grpcio")
# Rows whose tests use none of a package say nothing about it.
_CONCERNED = {
    "hand-off": _PACKAGES[:3],
    "models": _PACKAGES[1:3],
    "API": _PACKAGES[3:],
    "client": _PACKAGES[3:],
}


def runs() -> str:
    """Versions and outcome of every combination that has been run."""
    lines = []
    for row in rows("versions"):
        concerned = _CONCERNED[row["tests"]]
        shown = [row[name] if name in concerned and name in row else "" for name in _PACKAGES]
        lines.append([row["name"], row["tests"], *shown, row["passed"], row["failed"]])
    return tables.markdown(("combination", "tests", *_PACKAGES, "passed", "failed"), lines)
