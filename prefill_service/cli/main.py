"""The ``prefill-service`` command: its commands and what its exit codes mean.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import prefill_service
from prefill_service.cli.back_up import add_backup
from prefill_service.cli.calibrate import add_calibrate
from prefill_service.cli.command_parser import USAGE_ERROR, CommandParser
from prefill_service.cli.completion import add_completion
from prefill_service.cli.config_show import add_config
from prefill_service.cli.doctor import add_doctor
from prefill_service.cli.estimate import add_estimate
from prefill_service.cli.healthcheck import add_healthcheck
from prefill_service.cli.serve import add_serve
from prefill_service.errors import Reason, ServiceError

FAILURE = 1

OTHER_NAMES = {"plan": "estimate"}
"""Commands by names that help does not show."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for failures, 2 for configuration."""
    args = make_parser().parse_command(_canonical(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args))
    except ServiceError as error:
        print(f"prefill-service: {error}", file=sys.stderr)
        return USAGE_ERROR if error.reason is Reason.CONFIG_INVALID else FAILURE


def make_parser() -> CommandParser:
    """The parser of all commands."""
    parser = CommandParser(prog="prefill-service", description=prefill_service.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_serve(commands)
    add_doctor(commands)
    add_config(commands)
    add_healthcheck(commands)
    add_estimate(commands)
    add_calibrate(commands)
    add_backup(commands)
    add_completion(commands, parser)
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    return parser


def _canonical(argv: Sequence[str]) -> Sequence[str]:
    """The command line with the command's own name for another one of it."""
    name = OTHER_NAMES.get(argv[0]) if argv else None
    if name is None:
        return argv
    print(f"prefill-service: {argv[0]} stands for {name}", file=sys.stderr)
    return [name, *argv[1:]]


def _version(args: argparse.Namespace) -> int:
    print(f"prefill-service {prefill_service.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
