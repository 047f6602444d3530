"""``prefill-service completion``: scripts that let a shell complete commands and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prefill_service.cli.command_parser import CommandParser

_DESCRIPTION = """\
Print the completion script of a shell. To use it from the next shell on:

  bash  prefill-service completion bash > ~/.local/share/bash-completion/completions/prefill-service
  zsh   prefill-service completion zsh > "${fpath[1]}/_prefill-service"
  fish  prefill-service completion fish > ~/.config/fish/completions/prefill-service.fish
"""


def add_completion(commands: argparse._SubParsersAction[Any], root: CommandParser) -> None:
    """Add the command to ``prefill-service``; ``root`` is what is completed."""
    parser = commands.add_parser(
        "completion", help="print a shell's completion script", description=_DESCRIPTION
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    parser.set_defaults(run=lambda args: _print_script(root, args.shell))


def _print_script(root: CommandParser, shell: str) -> int:
    import shtab

    _mark_files(root)
    print(shtab.complete(root, shell))
    return 0


def _mark_files(parser: argparse.ArgumentParser) -> None:
    """Have file names completed wherever an option takes a path."""
    import shtab

    for action in parser._actions:
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command)
