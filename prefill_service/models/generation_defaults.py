"""What a checkpoint's ``generation_config.json`` says of sampling, as ``vllm serve`` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefill_service.compat import ensure_torchvision
from prefill_service.models.weights.refusal import refuse

ensure_torchvision()

from transformers import GenerationConfig  # noqa: E402

FILE = "generation_config.json"
_NAMES = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""Name in the file to name in vLLM: those that ``ModelConfig.get_diff_sampling_param`` takes."""


def read_generation_defaults(folder: Path, config: Any) -> Mapping[str, float]:
    """Sampling parameters for requests that leave them out, by vLLM's names.

    vLLM's endpoint for token ids, which the service uses, applies none of them itself. Ends of
    sequence, which the file names too, vLLM does apply.

    Args:
        folder: of the checkpoint.
        config: transformers' configuration of it, which older checkpoints have the values in.

    Raises:
        ServiceError: MODEL_INVALID, naming a value that is no number.
    """
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # the file is not there
        generation = GenerationConfig.from_model_config(config)
    except (ValueError, TypeError) as error:
        raise refuse(str(folder), FILE, f"transformers refuses it: {error}") from error
    named = generation.to_diff_dict()
    defaults: dict[str, float] = {}
    for key, name in _NAMES.items():
        value = named.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(str(folder), FILE, f"{key} = {value!r}; expected a number", field=key)
        defaults[name] = value
    return defaults
