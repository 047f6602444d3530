"""An argument parser whose errors are one line that names the nearest option."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

USAGE_ERROR = 2


class CommandParser(argparse.ArgumentParser):
    """``argparse``'s parser; its commands set themselves as the default of ``parser``."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", CommandHelp)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.set_defaults(parser=self)

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")

    def parse_command(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line; exits with code 2 if there is anything wrong with it."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            command: CommandParser = parsed.parser
            command.error(command.unknown_arguments(unknown))
        return parsed

    def unknown_arguments(self, unknown: Sequence[str]) -> str:
        """What to say about arguments that this command does not have."""
        text = f"unrecognized arguments: {' '.join(unknown)}"
        wrong = next((one for one in unknown if one.startswith("-")), "")
        close = difflib.get_close_matches(wrong.partition("=")[0], self.visible_options(), n=1)
        return f"{text}; did you mean {close[0]}?" if close else text

    def visible_options(self) -> list[str]:
        """The options that help shows."""
        return [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for option in action.option_strings
        ]


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Help in which an option that can be switched off takes one line: ``--[no-]NAME``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    @override
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        return super()._format_action_invocation(action)
