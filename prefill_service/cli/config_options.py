"""The service's configuration as options of a command: one option a field."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefill_service.cli.config_loading import RENAMED_SECTIONS, ResolvedConfig, resolve_config
from prefill_service.config import ServiceConfig

SHORT_NAMES = {
    "engine.model": "--model",
    "engine.ranks": "--ranks",
    "engine.device": "--device",
    "engine.dtype": "--dtype",
    "server.host": "--host",
    "server.port": "--port",
    "server.insecure": "--insecure",
    "storage.data_dir": "--data-dir",
    "vllm.max_model_len": "--max-model-len",
}
"""Options shown under a shorter name; the full one is accepted, too."""

MOST_USED = (
    "engine.model",
    "engine.ranks",
    "engine.device",
    "engine.dtype",
    "server.host",
    "server.port",
    "server.insecure",
    "storage.data_dir",
    "vllm.url",
)
"""With --config, the ten that help shows first."""

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_config_options(parser: argparse.ArgumentParser, *, show_all: bool) -> None:
    """Add --config and an option for each field of ``ServiceConfig``.

    Args:
        parser: the command's.
        show_all: whether help shows more than the most used ones; all are accepted.
    """
    most_used = parser.add_argument_group("most used")
    most_used.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    options = {option.key: option for option in _config_options()}
    for key in MOST_USED:
        options[key].add_to(most_used)
    for section in dataclasses.fields(ServiceConfig):
        text = typing.cast(Any, section.default_factory).__doc__
        group = parser.add_argument_group(section.name, text) if show_all else parser
        for key, option in options.items():
            if key.startswith(f"{section.name}.") and key not in MOST_USED:
                option.add_to(group, hidden=not show_all)
    for option in options.values():
        option.add_hidden_spellings(parser)


def resolve_from(args: argparse.Namespace) -> ResolvedConfig:
    """The configuration of a command line that has these options.

    Raises:
        ServiceError: CONFIG_INVALID.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for key, value in vars(args).items():
        section, _, name = key.partition(".")
        if name:
            overrides.setdefault(section, {})[name] = value
    return resolve_config(args.config, overrides)


@dataclasses.dataclass(frozen=True)
class _ConfigOption:
    """A field of the configuration on the command line.

    Args:
        key: "section.name".
        kind: the field's type.
        default: its default value.
        metadata: its help and choices, as in config.
    """

    key: str
    kind: Any
    default: Any
    metadata: typing.Mapping[str, Any]

    def add_to(self, group: argparse._ActionsContainer, *, hidden: bool = False) -> None:
        """Add the option under the name that is shown."""
        group.add_argument(self._shown_name, **self._settings(hidden))

    def add_hidden_spellings(self, parser: argparse.ArgumentParser) -> None:
        """Add the full name where a shorter one is shown, and names of earlier releases."""
        for spelling in self._hidden_names():
            parser.add_argument(spelling, **self._settings(hidden=True))

    @property
    def _full_name(self) -> str:
        return "--" + self.key.replace(".", "-").replace("_", "-")

    @property
    def _shown_name(self) -> str:
        return SHORT_NAMES.get(self.key, self._full_name)

    def _hidden_names(self) -> list[str]:
        section = self.key.partition(".")[0]
        earlier = [old for old, new in RENAMED_SECTIONS.items() if new == section]
        names = [self._full_name.replace(section, old, 1) for old in earlier]
        return names if self._shown_name == self._full_name else [self._full_name, *names]

    def _settings(self, hidden: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "dest": self.key,
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS if hidden else self._help(),
        }
        if self.kind is bool:
            return settings | {"action": argparse.BooleanOptionalAction}
        if isinstance(self.kind, types.GenericAlias):
            return settings | {"action": "append", "metavar": "TEXT"}
        settings |= {"type": self.kind, "metavar": _METAVARS[self.kind]}
        choices = self.metadata.get("choices")
        if choices and self.kind is str:
            settings["metavar"] = "NAME"
        return settings | {"choices": choices or None}

    def _help(self) -> str:
        text = self.metadata["help"]
        choices: Sequence[object] = self.metadata.get("choices", ())
        if choices:
            text = f"{text} One of {', '.join(map(str, choices))}."
        if isinstance(self.kind, types.GenericAlias):
            return f"{text} May be repeated."
        default = ("on" if self.default else "off") if self.kind is bool else self.default
        return f"{text} (default: {'none' if default == '' else default})".replace("%", "%%")


def _config_options() -> list[_ConfigOption]:
    found = []
    for section in dataclasses.fields(ServiceConfig):
        kind = typing.cast(Any, section.default_factory)
        hints = typing.get_type_hints(kind)
        values = kind()
        found += [
            _ConfigOption(
                key=f"{section.name}.{option.name}",
                kind=hints[option.name],
                default=getattr(values, option.name),
                metadata=option.metadata,
            )
            for option in dataclasses.fields(kind)
        ]
    return found
