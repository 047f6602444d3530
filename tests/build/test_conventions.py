"""The project's conventions, read from the syntax trees.

ruff holds what it can (pyproject.toml); these are the rules that it has no words for.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = (ROOT / "prefill_service", ROOT / "kernels" / "src")
CLIENT = ROOT / "clients" / "python" / "src" / "prefill_client"
FOLDERS = (
    *PRODUCT,
    CLIENT,
    ROOT / "kernels" / "tests",
    ROOT / "clients" / "python" / "tests",
    ROOT / "tests",
    ROOT / "benchmarks",
    ROOT / "tools",
)
MOST_MODULES = 16

Finding = tuple[int, str]
Check = Callable[[ast.Module, str], Iterator[Finding]]


def sources(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


# ---- rules that hold for a file ------------------------------------------------------------


def packed_assignments(tree: ast.Module, text: str) -> Iterator[Finding]:
    """``a, b = x, y`` is for swapping: then a value names one of the targets."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        for target in node.targets:
            if not isinstance(target, ast.Tuple):
                continue
            targets = {ast.unparse(element) for element in target.elts}
            used = {
                ast.unparse(part)
                for part in ast.walk(node.value)
                if isinstance(part, ast.Name | ast.Attribute | ast.Subscript)
            }
            if not targets & used:
                yield node.lineno, f"packed assignment: {ast.unparse(node)}"


def formatting_switched_off(tree: ast.Module, text: str) -> Iterator[Finding]:
    """``# fmt: skip`` and ``# fmt: off`` are for tables: lists, tuples and dicts of data."""
    lines = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and re.match(r"#\s*fmt: (skip|off)", token.string)
    }
    tables: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Dict | ast.Set) and _is_data(node):
            # The comment stands at the table's last line, or above its first one.
            tables |= {node.lineno - 1, *range(node.lineno, (node.end_lineno or 0) + 2)}
    yield from ((line, "formatting switched off, and no table of data") for line in lines - tables)


def _is_data(node: ast.AST) -> bool:
    allowed = (
        ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Constant, ast.Name, ast.Attribute, ast.Load,
        ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp, ast.operator, ast.Starred,
        ast.JoinedStr, ast.FormattedValue, ast.BoolOp, ast.boolop,
    )  # fmt: skip
    return all(isinstance(part, allowed) for part in ast.walk(node))


_STARTERS = re.compile(
    r"(?:^|\.)(?:start|Popen|open|connect|mkdtemp|mkstemp|memfd_create|mmap|bind|listen|"
    r"socketpair|pipe|TemporaryDirectory|NamedTemporaryFile|create_task|init_process_group|mkdir)$"
)


def working_constructors(tree: ast.Module, text: str) -> Iterator[Finding]:
    """A constructor starts no thread or process and opens no file, socket or database."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for method in owner.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__post_init__"):
                for call in _calls_now(method):
                    name = ast.unparse(call.func)
                    if _STARTERS.search(name) or name.endswith("socket.socket"):
                        yield call.lineno, f"{owner.name}.{method.name} calls {name}"


def _calls_now(function: ast.FunctionDef) -> Iterator[ast.Call]:
    """Calls of a function's body, not those inside functions it defines."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting += ast.iter_child_nodes(node)


_FRAGMENT = re.compile(
    r"(See ``|Of (?!all\b)|So far|As of |As it |As they |Those |Every one|Its |Their |In \w+\.$|"
    r"The same\b.{0,20}\.$|Nothing\b.{0,12}\.$)"
)


def fragment_docstrings(tree: ast.Module, text: str) -> Iterator[Finding]:
    """A docstring is a sentence: it has more than two words and ends with a mark."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            found = ast.get_docstring(node)
            if found is None:
                continue
            name = getattr(node, "name", "module")
            line = getattr(node, "lineno", 1)
            first = re.split(r"\n\s*\n", found)[0]
            if _FRAGMENT.match(first) or len(first.split()) < 3:
                yield line, f"{name}: a fragment for a docstring: {first[:60]!r}"
            elif first.rstrip()[-1] not in ".:!?`)":
                yield line, f"{name}: its docstring ends without a full stop"


PER_FILE: dict[str, tuple[Check, tuple[Path, ...]]] = {
    "packed assignments": (packed_assignments, FOLDERS),
    "formatting": (formatting_switched_off, FOLDERS),
    "constructors": (working_constructors, (*PRODUCT, CLIENT)),
    "docstrings": (fragment_docstrings, (*PRODUCT, CLIENT)),
}


# ---- rules that hold for the whole ---------------------------------------------------------


def repeated_basenames(folder: Path) -> list[str]:
    """One name, one module; ``base`` and ``__init__`` have a fixed meaning."""
    names = Counter(path.name for path in folder.rglob("*.py"))
    return sorted(
        f"{path.relative_to(ROOT)}: there is another {path.name}"
        for path in folder.rglob("*.py")
        if names[path.name] > 1 and path.stem not in ("base", "__init__", "__main__")
    )


def crowded_folders(folder: Path) -> list[str]:
    counts = Counter(path.parent for path in folder.rglob("*.py") if path.stem != "__init__")
    return sorted(
        f"{where.relative_to(ROOT)}: {count} modules, {MOST_MODULES} at most"
        for where, count in counts.items()
        if count > MOST_MODULES
    )


def modules_far_from_their_importer(folder: Path) -> list[str]:
    """A module with one importer lives beside or below it, or in a package of a lower layer.

    Across packages the layers decide (test_architecture.py), so only importers in the same
    top-level package count.
    """
    importers: dict[Path, set[Path]] = defaultdict(set)
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                module = folder.parent / f"{name.replace('.', '/')}.py"
                if module.is_file() and module != path:
                    importers[module].add(path)
    found = []
    for module, users in importers.items():
        (user, *more) = users
        package = module.relative_to(folder).parts[0]
        if more or user.relative_to(folder).parts[0] != package:
            continue
        if user.parent not in module.parents:
            found.append(f"{module.relative_to(ROOT)}: only {user.relative_to(ROOT)} imports it")
    return sorted(found)


# Names that mean the same wherever they stand: life cycles, conversions, Python's own protocols.
COMMON_VERBS = {
    "close", "start", "stop", "open", "run", "wait", "kill", "finish", "report", "result",
    "to_dict", "from_dict", "to_json", "from_json", "forward", "of", "of_heads",
    "acquire", "release", "start_chunk", "attending_layers", "num_tokens", "tokens", "rows",
    "seconds", "total", "ready", "pid",
}  # fmt: skip
MOST_OWNERS = 3
ALIKE = 4
"""Classes with so many public methods of the same names are of one kind."""


def overloaded_methods(*folders: Path) -> list[str]:
    """A public method's name belongs to few classes, implementations of one base apart."""
    owners: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, list[str]] = {}
    methods: dict[str, set[str]] = {}
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0] for base in node.bases]
                methods[node.name] = {
                    method.name
                    for method in node.body
                    if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                }

    def root(owner: str, name: str) -> str:
        """The topmost ancestor that has the method too."""
        for base in bases.get(owner, []):
            if name in methods.get(base, set()):
                return root(base, name)
            above = root(base, name) if base in bases else base
            if name in methods.get(above, set()):
                return above
        return owner

    for owner, names in methods.items():
        for name in names:
            if not name.startswith("_") and name not in COMMON_VERBS:
                owners[name].add(root(owner, name))
    for found in owners.values():
        # Implementations of an interface that layering keeps them from importing.
        for one, other in itertools.combinations(sorted(found), 2):
            if len(methods[one] & methods[other] - COMMON_VERBS) >= ALIKE:
                found.discard(other)
    return sorted(
        f"{name}: {', '.join(sorted(found))}"
        for name, found in owners.items()
        if len(found) > MOST_OWNERS and not name[0].isupper()
    )


def findings(check: Check, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        text = path.read_text()
        tree = ast.parse(text, str(path))
        found += [f"{path.relative_to(ROOT)}:{line} {what}" for line, what in check(tree, text)]
    return found


@pytest.mark.parametrize("rule", PER_FILE)
def test_files_keep(rule: str) -> None:
    check, folders = PER_FILE[rule]
    assert findings(check, sources(*folders)) == []


@pytest.mark.parametrize("folder", PRODUCT, ids=lambda path: path.name)
def test_one_module_of_a_name(folder: Path) -> None:
    assert repeated_basenames(folder) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_folders_are_small(folder: Path) -> None:
    assert crowded_folders(folder) == []


def test_modules_live_with_their_importer() -> None:
    assert modules_far_from_their_importer(PRODUCT[0]) == []


def test_methods_that_differ_have_names_that_differ() -> None:
    assert overloaded_methods(*PRODUCT) == []


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (packed_assignments, "a, b = 1, x\n", "a, b = b, a\nc, d = f()\n"),
        (formatting_switched_off, "f(a,\n  b)  # fmt: skip\n", "T = [\n 1, 2,\n]  # fmt: skip\n"),
        (
            working_constructors,
            "class A:\n def __init__(self):\n  t = Thread()\n  t.start()\n",
            "class A:\n def __init__(self):\n  self.f = lambda: open('x')\n",
        ),
        (fragment_docstrings, '"""Of some heads."""\n', '"""What some heads attend to."""\n'),
    ],
)
def test_checks_can_fail(check: Check, bad: str, good: str) -> None:
    assert list(check(ast.parse(bad), bad))
    assert not list(check(ast.parse(good), good))
