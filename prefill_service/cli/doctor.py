"""``prefill-service doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from prefill_service.cli.config_options import add_config_options, resolve_from

if TYPE_CHECKING:
    from prefill_service.cli.machine_checks import Finding

_DESCRIPTION = """\
Look at what the service needs of this machine: packages, GPUs, vLLM, video libraries, the decoder's
sandbox, memory, disk, ports. Give it the options that `serve` will have; all of them are accepted.

Exit code 1 if anything required is missing. Notes cost something, but the service runs.
"""


def add_doctor(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine can do, and what is missing",
        description=_DESCRIPTION,
        usage="%(prog)s [OPTION VALUE ...]",
    )
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    add_config_options(parser, show_all=False)
    parser.set_defaults(run=_diagnose)


def _diagnose(args: argparse.Namespace) -> int:
    config = resolve_from(args).config
    from prefill_service.cli.machine_checks import Level, check_machine

    findings = []
    for finding in check_machine(config):
        findings.append(finding)
        if not args.json:
            print(_as_text(finding), flush=True)
    missing = [finding for finding in findings if finding.level is Level.MISSING]
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif missing:
        print(f"\nmissing: {', '.join(finding.subject for finding in missing)}")
    else:
        print("\nnothing required is missing")
    return 1 if missing else 0


def _as_text(finding: Finding) -> str:
    """A finding in lines as wide as the terminal, its remedy below."""
    head = f"{finding.level:<8} {finding.subject:<16} "
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    indent = " " * len(head)
    lines = textwrap.wrap(finding.text, width, initial_indent=head, subsequent_indent=indent)
    if finding.remedy:
        arrow = f"{indent}-> "
        lines += textwrap.wrap(
            finding.remedy, width, initial_indent=arrow, subsequent_indent=indent
        )
    return "\n".join(lines)
