"""A cost model in a file: every number with its unit, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefill_service.cost_model.cost import COEFFICIENTS, CostModel
from prefill_service.errors import Reason, ServiceError

_FORMAT = "prefill-service cost profile"
_VERSION = 1
_UNITS = {
    "per_pass": "s per layer and chunk",
    "per_linear_flop": "s per FLOP of linear layers",
    "per_attention_flop": "s per FLOP of attention",
    "per_byte": "s per byte received",
    "per_call": "s per operation of an exchange",
}


def save_profile(model: CostModel, path: Path) -> None:
    """Write a model.

    Raises:
        ServiceError: CONFIG_INVALID, if the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "provenance": model.provenance,
        "coefficients": {
            name: {"value": getattr(model, name), "unit": _UNITS[name]} for name in COEFFICIENTS
        },
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise _invalid(path, f"cannot be written: {error.strerror}") from error


def load_profile(path: Path) -> CostModel:
    """Read a model.

    Raises:
        ServiceError: CONFIG_INVALID, naming the file and what in it is not accepted.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _invalid(path, f"is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _invalid(path, f"is not a cost profile: expected format {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise _invalid(path, f"version = {content.get('version')!r}; expected {_VERSION}")
    provenance = content.get("provenance")
    entries = content.get("coefficients")
    if not isinstance(provenance, str):
        raise _invalid(path, f"provenance = {provenance!r}; expected text")
    if not isinstance(entries, dict):
        raise _invalid(path, "coefficients are missing")
    values = {name: _value(path, name, entries.get(name)) for name in COEFFICIENTS}
    try:
        return CostModel(**values, provenance=provenance)
    except ValueError as error:
        raise _invalid(path, str(error)) from error


def _value(path: Path, name: str, entry: Any) -> float:
    if not isinstance(entry, dict):
        raise _invalid(path, f"coefficient {name} is missing")
    if entry.get("unit") != _UNITS[name]:
        raise _invalid(path, f"unit of {name} = {entry.get('unit')!r}; expected {_UNITS[name]!r}")
    value = entry.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(path, f"value of {name} = {value!r}; expected a number")
    return float(value)


def _invalid(path: Path, text: str) -> ServiceError:
    return ServiceError(Reason.CONFIG_INVALID, f"profile {path} {text}", path=path)
