"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "prefill_service"
CLIENT = ROOT / "clients" / "python" / "src"

# Each package of the service and what it may import of the others. Anything may import
# errors, config, compat, ids, paging and attention_shape; service.py and cli/, which wire it
# all, may import anything.
BASE = {"errors", "config", "compat", "ids", "paging", "attention_shape", "parent_death"}
ALLOWED: dict[str, set[str]] = {
    "attention": set(),
    "parallel": {"attention", "models.prefix_plan"},
    # The catalogue of exchanges, and what their formulas need. None of it imports torch.
    "cost_model": {
        "models.model_shape",
        "parallel.chunking",
        "parallel.exchanges.catalog",
        "parallel.exchanges.cost_terms",
        "parallel.token_order",
    },
    "storage": set(),
    "video": {"storage"},
    "kv": {"models.prefix_plan"},
    "models": {"attention", "kv.fingerprint", "kv.manifest", "video.geometry", "video.index"},
    "engine": {"models", "attention", "parallel", "cost_model", "kv", "storage", "video"},
    "calibration": {"engine", "models", "attention", "parallel", "video"},
    "generation": {"kv", "models.prefix_plan", "models.weights"},
    "scheduling": {
        "attention",
        "engine",
        "parallel",
        "cost_model",
        "models",
        "kv",
        "storage",
        "video",
        "generation",
    },
    "api": {"scheduling", "attention", "engine", "parallel", "models", "kv", "video", "generation"},
}


def imports(path: Path, top: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at any depth, relative ones resolved."""
    package = path.relative_to(top).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def violations(folder: Path, top: Path, package: str, allowed: set[str]) -> list[str]:
    """Imports from ``package`` that are neither in ``allowed`` nor a parent of something in it."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for line, name in imports(path, top):
            rest = name.removeprefix(f"{package}.")
            if rest == name or within(rest, allowed):
                continue
            if any(entry.startswith(f"{rest}.") for entry in allowed):
                continue  # `from prefill_service.kv import manifest` names prefill_service.kv too
            found.append(f"{path.relative_to(top)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_packages_import_downwards_only(name: str) -> None:
    allowed = {name} | ALLOWED[name] | BASE
    assert violations(SERVICE / name, ROOT, "prefill_service", allowed) == []


def test_every_package_is_in_the_table() -> None:
    packages = {path.parent.name for path in SERVICE.glob("*/__init__.py")}
    assert packages == {*ALLOWED, "cli"}


def test_the_cost_model_imports_no_torch() -> None:
    """Nor does configuration, which has the names of the exchanges from the same catalogue."""
    code = (
        "import sys; import prefill_service.config; print('numpy' in sys.modules)\n"
        "import prefill_service.cost_model.search, prefill_service.cost_model.search_table\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_connector_needs_kv_and_vllm_only() -> None:
    """vLLM's processes must not load the engine."""
    for path in SERVICE.glob("kv/vllm_connector/*.py"):
        assert not [
            f"{path.name}:{line} imports {name}"
            for line, name in imports(path, ROOT)
            if name.startswith("prefill_service.")
            and not within(name.removeprefix("prefill_service."), {"kv", "errors", "compat"})
        ]


def test_client_needs_grpc_and_protobuf_only() -> None:
    standard = sys.stdlib_module_names
    ours = {"prefill_client", "prefill", "grpc", "google"}
    optional = {CLIENT / "prefill_client" / "cli" / "picture.py": {"matplotlib"}}
    found = []
    for path in sorted(CLIENT.rglob("*.py")):
        for line, name in imports(path, CLIENT):
            top = name.partition(".")[0]
            if top not in standard and top not in ours | optional.get(path, set()):
                found.append(f"{path.relative_to(CLIENT)}:{line} imports {name}")
    assert found == []


def test_client_imports_without_its_extras() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import prefill_client.batch, prefill_client.cli.commands"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_violations_are_found(tmp_path: Path) -> None:
    """The checks above can fail."""
    folder = tmp_path / "prefill_service" / "attention"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text(
        "from prefill_service.video import index\n"
        "def f():\n"
        "    from ..api import server\n"
        "import prefill_service.errors\n"
    )
    found = violations(folder, tmp_path, "prefill_service", {"attention"} | BASE)
    assert [entry.split(" imports ")[1] for entry in found] == [
        "prefill_service.video",
        "prefill_service.video.index",
        "prefill_service.api",
        "prefill_service.api.server",
    ]
