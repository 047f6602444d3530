"""``prefill-service backup``: a checked copy of the data folder, which a service can use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prefill_service.cli.config_options import add_config_options, resolve_from

_DESCRIPTION = """\
Copy the data folder of a service, which may be running: its videos, their index and its jobs. The
copy is a data folder itself. To restore it, stop the service and put it in the place of the old
one, or start with --data-dir DEST.

DEST must not exist, or be empty; it appears when it is complete and on disk. Databases are checked
and videos compared with their sha256. Answers go on meanwhile; what comes in during the copy is
not in it. Exit code 1 if a file is damaged or the disk is full, 2 if a folder cannot be used.
"""


def add_backup(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "backup",
        help="copy videos and jobs to a folder that a service can use",
        description=_DESCRIPTION,
        usage="%(prog)s DEST [--config FILE] [--data-dir TEXT]",
    )
    parser.add_argument("destination", type=Path, metavar="DEST", help="The new folder.")
    add_config_options(parser, show_all=False)
    parser.set_defaults(run=_back_up)


def _back_up(args: argparse.Namespace) -> int:
    from prefill_service.storage.backup import back_up

    data_dir = Path(resolve_from(args).config.storage.data_dir).expanduser()
    report = back_up(data_dir, args.destination)
    print(
        f"{args.destination} has {report.videos} videos, {report.uploads} unfinished or failed "
        f"uploads and {report.jobs} jobs; {report.num_bytes / (1 << 20):.1f} MiB of files"
    )
    return 0
