"""``prefill-service serve``: run the service until a signal stops it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any

from prefill_service.cli.config_options import add_config_options, resolve_from
from prefill_service.errors import Reason, ServiceError

_DESCRIPTION = """\
Serve the API until SIGTERM or SIGINT; the first one drains, the second one stops at once.

Each option can also stand in the TOML file given with --config, as NAME = VALUE under
[SECTION]: --engine-page-tokens 64 is page_tokens = 64 under [engine]. The command line wins.
`prefill-service config show` prints what comes out, `prefill-service doctor` whether this
machine can run it.
"""


def add_serve(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "serve",
        help="run the service",
        description=_DESCRIPTION,
        usage="%(prog)s --model TEXT [OPTION VALUE ...]",
        add_help=False,  # the most used options come first
    )
    add_config_options(parser, show_all=True)
    rest = parser.add_argument_group("logging and help")
    rest.add_argument("-h", "--help", action="help", help="Show this and exit.")
    rest.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        metavar="NAME",
        help="Least level logged to stderr. One of %(choices)s. (default: %(default)s)",
    )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    config = resolve_from(args).config
    if not config.engine.model:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            "no model given: use --model, or model under [engine] in the file of --config",
            name="engine.model",
        )
    from prefill_service.service import Service

    async def run() -> None:
        await Service(config).run(announce=lambda line: print(line, flush=True))

    asyncio.run(run())
    return 0
