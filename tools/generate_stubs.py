"""Generate the Python stubs of protos/ into the client package.

    python tools/generate_stubs.py [--out DIR]

Run it after changing a .proto and commit the result; a test checks that regenerating gives
no diff. The grpcio-tools version is pinned because stubs refuse to import on runtimes older
than their generator (docs/api.md).
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "clients" / "python" / "src"
PINNED = "1.81.1"


def generate(out: Path) -> None:
    """Write the stubs of every .proto below protos/ to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *sources,
        ]
    )
    if code != 0:
        sys.exit(f"protoc failed with code {code}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=STUBS)
    arguments = parser.parse_args()
    if version("grpcio-tools") != PINNED:
        sys.exit(f"grpcio-tools {version('grpcio-tools')} is installed, {PINNED} is needed")
    generate(arguments.out)


if __name__ == "__main__":
    main()
