"""The families there are, by ``model_type``."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from prefill_service.models import families
from prefill_service.models.families.base import Family


def _find_families() -> Iterator[Family]:
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        family: Family | None = getattr(import_module(module.name), "FAMILY", None)
        if family is not None:
            yield family


FAMILIES: dict[str, Family] = {family.model_type: family for family in _find_families()}
"""One of each module in ``families`` that defines ``FAMILY``."""
