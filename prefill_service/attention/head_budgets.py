"""Budgets per layer and KV head: the epsilons that calibration found, in a file of their own.

Heads differ in how many keys they need, and they do so alike on every input, so that one budget
for all of them is too much for some and too little for others (S-HPLB, arXiv 2603.10353). Their
unit here is the KV head: the query heads of its group read the same blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefill_service.errors import Reason, ServiceError

VERSION = 1

MAX_EPSILON = 0.95
"""Largest epsilon of a head: at 1 it would keep nothing but what it keeps by place."""

_DIGEST_LETTERS = 12


@dataclass(frozen=True, slots=True)
class HeadBudgets:
    """Epsilons of every head of one model, calibrated together.

    Attributes:
        model_fingerprint: of the checkpoint that was calibrated (``kv.fingerprint``).
        epsilon: at which all heads together attend as many keys as with these budgets.
        head_epsilons: [layers that attend][kv_heads] attention mass that a head may misplace
            where a request asks for ``epsilon``; 0 to ``MAX_EPSILON``.
        layer_sensitivity: [layers that attend] relative deviation of the prefix's KV when one
            layer alone is approximated coarsely; empty if it was not measured. For the reader:
            selection does not use it.
    """

    model_fingerprint: str
    epsilon: float
    head_epsilons: tuple[tuple[float, ...], ...]
    layer_sensitivity: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the value and what is accepted.
        """
        if not 0 < self.epsilon < 1:
            raise ValueError(
                f"epsilon = {self.epsilon!r} is not accepted; expected 0 < epsilon < 1"
            )
        heads = {len(row) for row in self.head_epsilons}
        if len(heads) > 1:
            raise ValueError(f"head_epsilons has layers of {sorted(heads)} heads; expected equal")
        for layer, row in enumerate(self.head_epsilons):
            for head, value in enumerate(row):
                if not 0 <= value <= MAX_EPSILON:
                    raise ValueError(
                        f"head_epsilons[{layer}][{head}] = {value!r} is not accepted; "
                        f"expected 0 to {MAX_EPSILON}"
                    )
        if self.layer_sensitivity and len(self.layer_sensitivity) != len(self.head_epsilons):
            raise ValueError(
                f"layer_sensitivity has {len(self.layer_sensitivity)} layers; "
                f"expected {len(self.head_epsilons)}, as head_epsilons, or none"
            )
        for layer, value in enumerate(self.layer_sensitivity):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"layer_sensitivity[{layer}] = {value!r} is not accepted; expected 0 or more"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers that attend, KV heads."""
        return len(self.head_epsilons), len(self.head_epsilons[0]) if self.head_epsilons else 0

    @property
    def digest(self) -> str:
        """Short hash of all that changes the KV."""
        identity = json.dumps([self.model_fingerprint, self.epsilon, self.head_epsilons])
        return hashlib.sha256(identity.encode()).hexdigest()[:_DIGEST_LETTERS]

    def at(self, epsilon: float) -> tuple[tuple[float, ...], ...]:
        """[layers][kv_heads] epsilons of a request that asks for ``epsilon``: in proportion."""
        factor = epsilon / self.epsilon
        return tuple(
            tuple(min(value * factor, MAX_EPSILON) for value in row) for row in self.head_epsilons
        )

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        staging = path.with_name(f".{path.name}.new")
        staging.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        staging.replace(path)


def load_head_budgets(
    path: Path, fingerprint: str, *, shape: tuple[int, int], option: str = "engine.head_budgets"
) -> HeadBudgets:
    """Read budgets that are to serve a checkpoint.

    Args:
        path: of the JSON file.
        fingerprint: of the checkpoint.
        shape: its layers that attend in a prefill, which are all but the last, and KV heads.
        option: that names the file, for errors.

    Raises:
        ServiceError: CONFIG_INVALID; the file cannot be read, holds no budgets, or is another
            model's.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise _invalid(option, path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _invalid(option, path, f"is no JSON: {error}") from error
    try:
        budgets = _from_json(data)
    except ValueError as error:
        raise _invalid(option, path, f"holds no head budgets: {error}") from error
    if budgets.model_fingerprint != fingerprint:
        raise _invalid(
            option,
            path,
            f"was made for the model {budgets.model_fingerprint[:_DIGEST_LETTERS]}, but this one "
            f"is {fingerprint[:_DIGEST_LETTERS]}: calibrate it",
        )
    if budgets.shape != shape:
        (layers, kv_heads) = budgets.shape
        (wanted_layers, wanted_heads) = shape
        raise _invalid(
            option,
            path,
            f"has {layers} layers of {kv_heads} KV heads; expected {wanted_layers} of "
            f"{wanted_heads}",
        )
    return budgets


def _from_json(data: Any) -> HeadBudgets:
    if not isinstance(data, dict):
        raise ValueError(f"it holds {type(data).__name__}, expected an object")
    names = {"version", *HeadBudgets.__dataclass_fields__}
    if missing := names - data.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    if unknown := data.keys() - names:
        raise ValueError(f"{', '.join(sorted(unknown))} not known")
    if data["version"] != VERSION:
        raise ValueError(f"version = {data['version']!r} is not accepted; expected {VERSION}")
    if not isinstance(data["model_fingerprint"], str):
        raise ValueError(f"model_fingerprint = {data['model_fingerprint']!r}; expected a string")
    rows = data["head_epsilons"]
    if not isinstance(rows, list):
        raise ValueError(f"head_epsilons = {rows!r}; expected a list of lists of numbers")
    return HeadBudgets(
        model_fingerprint=data["model_fingerprint"],
        epsilon=_numbers("epsilon", [data["epsilon"]])[0],
        head_epsilons=tuple(
            _numbers(f"head_epsilons[{layer}]", row) for layer, row in enumerate(rows)
        ),
        layer_sensitivity=_numbers("layer_sensitivity", data["layer_sensitivity"]),
    )


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{name} = {values!r}; expected a list of numbers")
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} holds {value!r}; expected numbers")
    return tuple(map(float, values))


def _invalid(option: str, path: Path, what: str) -> ServiceError:
    text = f"{option}: {path} {what}"
    return ServiceError(Reason.CONFIG_INVALID, text, name=option, path=path)
