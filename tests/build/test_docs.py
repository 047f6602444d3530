"""What the documents name is there, their figures are current, and they read alike."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.report import documents
from tests.build.test_architecture import ALLOWED

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / name / "README.md" for name in ("clients/python", "deploy", "kernels")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAPERS = 20
FEWEST_TERMS = 35
LONGEST_README = 100
LONGEST_LINE = 100
LONGEST_SENTENCE = 30
# Phrases of a diary, of history and of pictures that are nobody's but this project's.
FORBIDDEN = (
    r"\b20\d\d-\d\d-\d\d\b",
    r"\bby hand\b",
    r"\bused to\b",
    r"\bthe same morning\b",
    r"\bat the time\b",
    r"\bearlier weights\b",
    r"\bhouse\b",
    r"\brooms?\b(?! for\b)",
)


def name_of(path: Path) -> str:
    """The path below the repository's root."""
    return str(path.relative_to(ROOT))


@cache
def files() -> frozenset[str]:
    """Every file of the repository's own folders, each with a leading slash."""
    skipped = {"build", "dist"}
    folders = [path for path in ROOT.glob("[!.]*") if path.is_dir() and path.name not in skipped]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return frozenset(f"/{path.relative_to(ROOT)}" for path in [*found, *ROOT.glob("*.*")])


def written(path: Path) -> str:
    """The text without code blocks and generated blocks."""
    text = documents.BLOCK.sub("", path.read_text())
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)


def prose(path: Path) -> list[str]:
    """Lines that are neither table, indented code nor a picture."""
    return [
        line
        for line in written(path).splitlines()
        if not re.match(r"\s*(\||!\[|<img|<!--)|    ", line)
    ]


def sentences(path: Path) -> list[str]:
    """Sentences of the prose, across lines; headings and list items end one."""
    text = "\n".join(prose(path))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[*#-]|\d+\.) )|(?<=\n)#", text)
    return [
        sentence
        for block in blocks
        for sentence in re.split(r"(?<=[.!?:])[)*\"]*\s+", " ".join(block.split()))
        if sentence
    ]


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"(?:\]\(|src=\")([^)#\"]+)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_every_document_is_reached_from_the_readme() -> None:
    reached = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        linked = {
            (path.parent / target).resolve()
            for target in re.findall(r"\]\(([^):#]+\.md)", path.read_text())
        }
        waiting += linked - reached
    assert {name_of(path) for path in {*DOCS} - reached} == set()


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_anchors_of_links_exist(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^):#]*)#([^)]+)\)", path.read_text()):
        text = (path.parent / target if target else path).read_text()
        headings = re.findall(r"^#+ (.*)", text, re.M)
        slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
        assert anchor in slugs


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_files_named_exist(path: Path) -> None:
    """Full paths, or the last parts of one."""
    named = re.findall(r"`([\w./-]+\.(?:py|proto|json|toml|jsonl))`", written(path))
    examples = {"questions.jsonl", "answers.jsonl", "trace.json"}
    wanted = [name for name in named if name not in examples]
    assert [name for name in wanted if not any(f.endswith(f"/{name}") for f in files())] == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_modules_named_exist(path: Path) -> None:
    for name in re.findall(r"python -m ([\w.]+)", path.read_text()):
        if name not in ("venv", "pytest"):
            base = f"/{name.replace('.', '/')}"
            assert {f"{base}.py", f"{base}/__main__.py"} & files(), name


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_make_targets_named_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:`|^(?: {4})?)make ([a-z-]+)", path.read_text(), re.M)
    assert [name for name in named if name not in targets] == []


def test_generated_blocks_and_charts_are_current() -> None:
    """If not: ``python -m benchmarks.report --write``."""
    assert [name_of(path) for path in documents.stale()] == []


def test_every_block_is_used() -> None:
    used = {name for path in documents.documents() for name in block_names(path)}
    assert set(documents.BLOCKS) - used <= {"machine"}


def block_names(path: Path) -> list[str]:
    """Names of the generated blocks of a document."""
    return [found[2] for found in documents.BLOCK.finditer(path.read_text())]


def rows_of(path: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its header."""
    section = path.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.M)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_table_of_packages_is_that_of_the_import_rules() -> None:
    rows = rows_of(ROOT / "docs" / "architecture.md", "Packages")
    table = {
        name.strip("`"): {one for one in allowed.split(", ") if one} for name, _, allowed in rows
    }
    assert table == ALLOWED


def test_the_glossary_has_the_words_of_the_code() -> None:
    """Each term, or the names it lists, occurs in the product's code."""
    folders = ("prefill_service", "kernels/src", "clients/python/src/prefill_client")
    code = "\n".join(
        path.read_text().lower() for folder in folders for path in (ROOT / folder).rglob("*.py")
    )
    terms = [row[0] for row in rows_of(ROOT / "docs" / "architecture.md", "Glossary")]
    assert len(terms) == len(set(terms))
    assert len(terms) >= FEWEST_TERMS
    patterns = [(term, re.sub(r"[ -]", r"[\\s_-]*", term)) for term in terms]
    missing = [term for term, pattern in patterns if not re.search(rf"{pattern}", code)]
    assert missing == []


def test_every_paper_says_what_is_here_and_what_is_not() -> None:
    sections = re.split(r"^## \d+\. ", (ROOT / "docs" / "papers.md").read_text(), flags=re.M)[1:]
    assert len(sections) == PAPERS
    for section in sections:
        assert re.match(r".*\(arXiv \d{4}\.\d{5}\)$", section.partition("\n")[0])
        assert "**Proposes**" in section
        assert "**Not here**" in section or "**Here**" in section
        assert ("**Here**" in section) == ("**Tests**" in section)


def test_recipes_are_written_alike() -> None:
    """Each is a section ``Add a ...`` with numbered steps."""
    sections = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.M)[1:]
    for section in sections:
        assert re.match(r"Add an? [\w -]+\n", section)
        assert re.search(r"^1\. ", section, re.M)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_lines_are_short(path: Path) -> None:
    assert [line for line in prose(path) if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_sentences_are_short(path: Path) -> None:
    assert [one for one in sentences(path) if len(one.split()) > LONGEST_SENTENCE] == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_present_tense_and_plain_words(path: Path) -> None:
    text = "\n".join(prose(path))
    assert [found for phrase in FORBIDDEN for found in re.findall(phrase, text, re.I)] == []
