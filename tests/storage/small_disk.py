"""Real file systems of some MiB, mounted where nothing else sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_TMPFS = 'mount -t tmpfs -o size="$2" none "$1"'
_EXT4 = 'mount -o loop "$2" "$1"'
_NAMESPACES = {"tmpfs": ["--map-root-user", "--mount"], "ext4": ["--mount"]}
KINDS = tuple(_NAMESPACES)
"""A tmpfs in a namespace of the user's own, and ext4 on a loop device, which root may mount."""


def run_on_small_disk(kind: str, mib: int, folder: Path, *arguments: str) -> str:
    """Run a Python module with ``folder``, on a disk of its own, as its first argument.

    Args:
        kind: one of ``KINDS``; the test is skipped where that cannot be mounted.
        mib: size of the disk.
        folder: an empty one.
        arguments: the module, and what follows the folder.

    Returns:
        Its standard output; it has ended with 0.
    """
    source = f"{mib}m"
    mount = _TMPFS
    if kind == "ext4":
        source = str(_make_ext4(folder.with_name(f"{folder.name}.img"), mib))
        mount = _EXT4
    namespace = [shutil.which("unshare") or "unshare", *_NAMESPACES[kind]]
    shell = [*namespace, "sh", "-c"]
    trial = _run([*shell, mount, "sh", str(folder), source])
    if trial.returncode:
        pytest.skip(f"no {kind} can be mounted here: {trial.stderr.strip()}")
    module, *rest = arguments
    command = [sys.executable, "-m", module, str(folder), *rest]
    done = _run([*shell, f'{mount} && shift 2 && exec "$@"', "sh", str(folder), source, *command])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def _make_ext4(image: Path, mib: int) -> Path:
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None or os.getuid() != 0:
        pytest.skip("no ext4 can be mounted here: it needs mkfs.ext4 and root")
    with image.open("wb") as file:
        file.truncate(mib << 20)
    # No block is kept for root, who these tests may be.
    subprocess.run([mkfs, "-q", "-F", "-m", "0", str(image)], check=True)
    return image


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


class Ballast:
    """Files that fill a disk to its last byte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def fill(self) -> None:
        """Write until nothing fits any more, in ever smaller pieces."""
        path = self._folder / f"ballast{len(self._files)}"
        self._files.append(path)
        with path.open("wb", buffering=0) as file:
            size = 1 << 20
            while size:
                try:
                    while file.write(os.urandom(size)):
                        pass
                except OSError:
                    size //= 2
            os.fsync(file.fileno())
        assert shutil.disk_usage(self._folder).free == 0

    def remove(self) -> None:
        """Give all of it back."""
        for path in self._files:
            path.unlink()
        self._files.clear()
