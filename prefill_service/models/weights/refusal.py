"""The error for a checkpoint that cannot be served."""

from __future__ import annotations

from prefill_service.errors import Reason, ServiceError


def refuse(model: str, file: str, text: str, **details: object) -> ServiceError:
    """MODEL_INVALID that names the file; to be raised.

    Args:
        model: as the operator named it.
        file: within the model's folder; empty if it is about the folder.
        text: what is wrong with it, and what is supported.
        **details: for the error's metadata.
    """
    message = f"{model}: {file}: {text}" if file else f"{model}: {text}"
    return ServiceError(Reason.MODEL_INVALID, message, model=model, file=file, **details)
