"""The folder ``kernels`` and other people's package ``kernels`` do not get into each other's way.

A folder without ``__init__.py`` is importable as a namespace package from the directory that it is
in. An installed package of that name wins over it, and transformers, which uses one if there is
one, does not take the folder for it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import prefill_kernels

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "kernels" / "src" / "prefill_kernels"


def output(code: str, folder: Path, *paths: Path) -> str:
    """What code prints that runs in a folder, which is first on its path as for ``python -m``."""
    path = os.pathsep.join([str(path) for path in paths] + [os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "src" / "__init__.py").exists()


def test_an_installed_package_of_that_name_wins(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("who = 'theirs'")
    assert output("import kernels; print(kernels.who)", ROOT, tmp_path) == "theirs"


def test_transformers_sees_no_package_in_it(tmp_path: Path) -> None:
    code = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available())"
    )
    assert output(code, ROOT) == output(code, tmp_path)


def test_every_module_is_used_by_the_service_or_public() -> None:
    """A module has an importer in the product, or is reached from a public name."""
    modules = {module_name(path) for path in SOURCE.rglob("*.py")}
    used = imported((ROOT / "prefill_service").rglob("*.py"))
    used |= {getattr(prefill_kernels, name).__module__ for name in prefill_kernels.__all__}
    used |= {"prefill_kernels", "prefill_kernels.cpu", "prefill_kernels.reference"}
    todo = list(used)
    while todo:
        path = SOURCE.parent / (todo.pop().replace(".", "/") + ".py")
        found = imported([path]) - used if path.is_file() else set()
        used |= found
        todo += found
    assert modules <= used, sorted(modules - used)


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(paths: Iterable[Path]) -> set[str]:
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {name for name in names if name.partition(".")[0] == "prefill_kernels"}
