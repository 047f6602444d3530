"""Write the figures into the documents, or say which documents are out of date.

python -m benchmarks.report --write
python -m benchmarks.report --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.report.documents import CHARTS, ROOT, stale


def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    charts: Mapping[str, Callable[[], str]] = CHARTS,
) -> int:
    """Exit status 1 if ``--check`` finds a document below ``root`` that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="bring all documents up to date")
    mode.add_argument("--check", action="store_true", help="fail if one is not")
    options = parser.parse_args(arguments)
    found = stale(root, charts)
    for path, text in found.items():
        print(f"{path.relative_to(root)}: {'written' if options.write else 'out of date'}")
        if options.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
