"""``prefill-service config show``: the configuration that ``serve`` would use."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from prefill_service.cli.config_loading import ResolvedConfig
from prefill_service.cli.config_options import add_config_options, resolve_from

_DESCRIPTION = """\
Print the configuration that `serve` would use with the same options, as a TOML file that --config
reads. A comment behind each value says where it comes from. All options of `serve` are accepted.
"""


def add_config(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    config = commands.add_parser("config", help="show the configuration")
    actions = config.add_subparsers(required=True, metavar="COMMAND")
    show = actions.add_parser(
        "show",
        help="print each option's value and where it comes from",
        description=_DESCRIPTION,
        usage="%(prog)s [OPTION VALUE ...]",
    )
    add_config_options(show, show_all=False)
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    print(to_toml(resolve_from(args)))
    return 0


def to_toml(resolved: ResolvedConfig) -> str:
    """The configuration as TOML, with the source of each value behind it."""
    lines = []
    for section in dataclasses.fields(resolved.config):
        values = getattr(resolved.config, section.name)
        lines.append(f"[{section.name}]")
        for option in dataclasses.fields(values):
            assignment = f"{option.name} = {_toml_value(getattr(values, option.name))}"
            lines.append(f"{assignment:<44} # {resolved.sources[f'{section.name}.{option.name}']}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _toml_value(value: object) -> str:
    """A basic value or list of strings; JSON's form of them is TOML's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
