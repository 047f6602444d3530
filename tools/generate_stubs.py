"""Generate the Python stubs of protos/ into the client package.

    python tools/generate_stubs.py [--out DIR]

Run it after changing a .proto and commit the result; a test checks that regenerating gives
no diff. The generator is old on purpose, and lies in a folder of its own, since its
requirements exclude the protobuf that the service runs on. Stubs load on their generator's
protobuf and on every later one, but on no earlier one, so an old generator's serve the most
people. The stubs of later generators also demand that much of grpcio (docs/versions.md).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "clients" / "python" / "src"
GENERATOR = "grpcio-tools==1.62.3"


def generate(out: Path) -> None:
    """Write the stubs of every .proto below protos/ to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    tools = _generator()
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"--proto_path={PROTOS}",
        f"--proto_path={tools / 'grpc_tools' / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *sources,
    ]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tools)}).returncode
    if code != 0:
        sys.exit(f"protoc failed with code {code}")


def _generator() -> Path:
    """The folder that has the generator, installed from the package index the first time."""
    folder = ROOT / "build" / GENERATOR
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    # It is built for Python 3.11 and 3.12 only; compiling it elsewhere would take minutes.
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        target = Path(fresh) / "tools"
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
        if subprocess.run([*command, GENERATOR]).returncode != 0:
            sys.exit(f"{GENERATOR} could not be installed; it needs Python 3.11 or 3.12")
        target.rename(folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=STUBS)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
