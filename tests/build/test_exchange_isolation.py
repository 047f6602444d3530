"""Nobody asks which implementation of an interface he has: what differs is behind its methods.

An interface is a ``Protocol`` or an ``ABC`` of the product, and it belongs to the folder that
defines it. Outside that folder no code may tell the classes that inherit from it apart.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.build.test_architecture import ROOT, SERVICE

INTERFACE_BASES = {"typing.Protocol", "typing_extensions.Protocol", "abc.ABC"}


@dataclass
class Module:
    """One source file: what its names refer to, and the bases of its classes."""

    path: Path
    tree: ast.Module
    names: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def resolve(self, node: ast.expr) -> str | None:
        """Dotted name that ``Name`` or ``module.Name`` stands for, or nothing."""
        if isinstance(node, ast.Subscript):  # Protocol[T]
            return self.resolve(node.value)
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None


def read_modules(folder: Path, top: Path) -> list[Module]:
    modules = []
    for path in sorted(folder.rglob("*.py")):
        module = Module(path, ast.parse(path.read_text(), str(path)))
        dotted = ".".join(path.relative_to(top).with_suffix("").parts)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    module.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    module.names[alias.asname or alias.name] = alias.name
            elif isinstance(node, ast.ClassDef):
                module.names[node.name] = f"{dotted}.{node.name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases = [module.resolve(base) for base in node.bases]
                module.classes[module.names[node.name]] = [base for base in bases if base]
        modules.append(module)
    return modules


def owners(modules: list[Module]) -> dict[str, set[Path]]:
    """Per interface and implementation, the folders of the interfaces that it is or has."""
    bases = {name: found for module in modules for name, found in module.classes.items()}
    folders = {name: module.path.parent for module in modules for name in module.classes}

    def of(name: str) -> set[Path]:
        above = bases.get(name, [])
        own = {folders[name]} if INTERFACE_BASES & set(above) else set()
        return own.union(*(of(base) for base in above))

    return {name: found for name in bases if (found := of(name))}


def asked_classes(tree: ast.Module) -> Iterator[ast.expr]:
    """Every class that ``isinstance``, ``issubclass``, ``type(x) is`` or a pattern asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass"):
                yield from alternatives(node.args[1])
        elif isinstance(node, ast.MatchClass):
            yield node.cls
        elif isinstance(node, ast.Compare) and is_type_call(node.left):
            yield from (one for other in node.comparators for one in alternatives(other))


def is_type_call(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"


def alternatives(node: ast.expr) -> Iterator[ast.expr]:
    """The classes of ``A``, ``(A, B)`` or ``A | B``."""
    if isinstance(node, ast.Tuple):
        for one in node.elts:
            yield from alternatives(one)
    elif isinstance(node, ast.BinOp):
        yield from alternatives(node.left)
        yield from alternatives(node.right)
    else:
        yield node


def violations(folder: Path, top: Path) -> list[str]:
    modules = read_modules(folder, top)
    owned = owners(modules)
    found = []
    for module in modules:
        for node in asked_classes(module.tree):
            name = module.resolve(node)
            folders = owned.get(name or "", set())
            if folders and not any(module.path.is_relative_to(one) for one in folders):
                found.append(f"{module.path.relative_to(top)}:{node.lineno} asks for {name}")
    return found


def test_no_code_asks_for_an_implementation_outside_its_folder() -> None:
    assert violations(SERVICE, ROOT) == []


def test_the_exchanges_are_among_what_is_checked() -> None:
    owned = owners(read_modules(SERVICE, ROOT))
    exchanges = SERVICE / "parallel" / "exchanges"
    base = "prefill_service.parallel.exchanges"
    assert owned[f"{base}.gather.GatherExchange"] == {exchanges}
    assert exchanges in owned[f"{base}.demand.exchange.DemandExchange"]


def test_violations_are_found(tmp_path: Path) -> None:
    """The check can fail."""
    inner = tmp_path / "product" / "exchanges"
    inner.mkdir(parents=True)
    (inner / "base.py").write_text(
        "from typing import Protocol\nclass Exchange(Protocol):\n    pass\n"
    )
    (inner / "gather.py").write_text(
        "from product.exchanges.base import Exchange\n"
        "class Gather(Exchange):\n"
        "    def same(self, other):\n"
        "        return isinstance(other, Gather)\n"
    )
    (tmp_path / "product" / "engine.py").write_text(
        "from product.exchanges import gather\n"
        "from product.exchanges.gather import Gather\n"
        "def ask(exchange):\n"
        "    if isinstance(exchange, int | gather.Gather): return 1\n"
        "    if type(exchange) is Gather: return 2\n"
        "    match exchange:\n"
        "        case Gather(): return 3\n"
    )
    found = violations(tmp_path / "product", tmp_path)
    assert sorted(entry.split()[0] for entry in found) == [
        "product/engine.py:4",
        "product/engine.py:5",
        "product/engine.py:7",
    ]
