"""The configuration from its sources: defaults, a TOML file and the command line.

Precedence: command line, then file, then default. Unknown names and bad values are refused
with the name at fault, where it came from and what would be accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_service.config import HEARTBEAT_S, ServiceConfig, split_address
from prefill_service.errors import Reason, ServiceError

logger = logging.getLogger(__name__)

DEFAULT = "default"
COMMAND_LINE = "command line"

RENAMED_SECTIONS = {"decoder": "vllm"}
"""Other names of sections, which files may use."""


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A configuration, and where each of its values comes from.

    Args:
        config: the values.
        sources: by "section.name": ``DEFAULT``, ``file PATH``, or ``COMMAND_LINE``.
    """

    config: ServiceConfig
    sources: dict[str, str]


def resolve_config(path: Path | None, overrides: Mapping[str, Any]) -> ResolvedConfig:
    """Merge the defaults, the TOML file and ``overrides`` ({section: {name: value}}).

    Raises:
        ServiceError: CONFIG_INVALID, naming the option, the value and what is accepted.
    """
    config = ServiceConfig()
    resolved = ResolvedConfig(config, {name: DEFAULT for name, _, _ in _options(config)})
    if path is not None:
        _apply(resolved, _read_toml(path), f"file {path}")
    _apply(resolved, overrides, COMMAND_LINE)
    _validate(resolved)
    return resolved


def _options(config: ServiceConfig) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield ("section.name", field, value) of each option."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for option in dataclasses.fields(values):
            yield f"{section.name}.{option.name}", option, getattr(values, option.name)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID, f"cannot read {path}: {error.strerror}", path=path
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID, f"{path} is not valid TOML: {error}", path=path
        ) from error


def _apply(resolved: ResolvedConfig, values: Mapping[str, Any], source: str) -> None:
    names = [section.name for section in dataclasses.fields(ServiceConfig)]
    for given, entries in values.items():
        section = RENAMED_SECTIONS.get(given, given)
        if section not in names:
            raise _unknown("section", given, names, source)
        if not isinstance(entries, dict):
            raise _invalid(section, entries, "a table", source)
        if section != given:
            if section in values:
                problem = f"[{given}] is an earlier name of [{section}]; the file has both"
                raise ServiceError(Reason.CONFIG_INVALID, f"{source}: {problem}", name=given)
            logger.warning("%s: section [%s] is called [%s] now", source, given, section)
        target = getattr(resolved.config, section)
        hints = typing.get_type_hints(type(target))
        for name, value in entries.items():
            key = f"{section}.{name}"
            if name not in hints:
                raise _unknown("option", key, [f"{section}.{one}" for one in hints], source)
            setattr(target, name, _convert(key, value, hints[name], source))
            resolved.sources[key] = source


def _convert(name: str, value: Any, hint: Any, source: str) -> Any:
    if isinstance(hint, types.GenericAlias):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise _invalid(name, value, "a list of strings", source)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _invalid(name, value, f"a value of type {hint.__name__}", source)


def _unknown(kind: str, name: str, known: list[str], source: str) -> ServiceError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return ServiceError(
        Reason.CONFIG_INVALID, f"{source}: there is no {kind} {name}; {hint}", name=name
    )


def _invalid(name: str, value: object, accepted: str, source: str) -> ServiceError:
    return ServiceError(
        Reason.CONFIG_INVALID,
        f"{source}: {name} = {value!r} is not accepted; expected {accepted}",
        name=name,
        value=value,
        accepted=accepted,
    )


def _validate(resolved: ResolvedConfig) -> None:
    """Check each value by its option's metadata, then what metadata cannot say.

    Raises:
        ServiceError: CONFIG_INVALID.
    """
    for name, option, value in _options(resolved.config):
        accepted = _refused(option.metadata, value)
        if accepted:
            raise _invalid(name, value, accepted, resolved.sources[name])
    for name, value, accepted in _conflicts(resolved.config):
        raise _invalid(name, value, accepted, resolved.sources[name])


def _refused(metadata: Mapping[str, Any], value: object) -> str:
    """Describe what an option accepts instead of ``value``; empty if it accepts it."""
    choices = metadata.get("choices")
    if choices:
        *first, last = map(str, choices)
        return "" if value in choices else f"{', '.join(first)} or {last}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    low: float | None = metadata["low"]
    high: float = metadata["high"]
    if (value > 0 if low is None else value >= low) and value <= high and value < math.inf:
        return ""
    if low is None:
        return "more than 0" + (f" and at most {_exact(high)}" if high < math.inf else "")
    return f"{_exact(low)} to {_exact(high)}" if high < math.inf else f"{_exact(low)} or more"


def _exact(limit: float) -> str:
    """All digits of a limit, which may be a number of bytes."""
    return str(int(limit)) if limit == int(limit) else str(limit)


def _conflicts(config: ServiceConfig) -> Iterator[tuple[str, object, str]]:
    """Yield (name, value, what is accepted) where a form or two values together are wrong."""
    server = config.server
    engine = config.engine
    if bool(server.tls_cert) != bool(server.tls_key):
        name = "tls_cert" if server.tls_cert else "tls_key"
        yield f"server.{name}", getattr(server, name), "tls_cert and tls_key together"
    if server.metrics_address and not _is_address(server.metrics_address):
        yield "server.metrics_address", server.metrics_address, "HOST:PORT, port 0 to 65535"
    if not config.storage.data_dir:
        yield "storage.data_dir", config.storage.data_dir, "a folder"
    for root in config.storage.import_roots:
        if not Path(root).expanduser().is_absolute():
            yield "storage.import_roots", root, "absolute paths"
    if engine.ranks % (engine.ulysses_degree or 1):
        divisors = f"a divisor of the {engine.ranks} ranks"
        yield "engine.ulysses_degree", engine.ulysses_degree, divisors
    if 0 < engine.balance_above < 1:
        yield "engine.balance_above", engine.balance_above, "0, or 1 or more"
    if engine.heartbeat_timeout_s <= HEARTBEAT_S:
        least = f"more than {HEARTBEAT_S:g}, the heartbeat"
        yield "engine.heartbeat_timeout_s", engine.heartbeat_timeout_s, least
    if config.vllm.url and not config.vllm.url.startswith(("http://", "https://")):
        yield "vllm.url", config.vllm.url, "an http:// or https:// URL"


def _is_address(text: str) -> bool:
    try:
        split_address(text)
    except ValueError:
        return False
    return True
