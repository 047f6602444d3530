"""A checkpoint's ``config.json``: read, and what it says of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_service.attention_shape import DTYPE_BYTES
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.model_shape import ModelShape
from prefill_service.models.weights.safetensors_files import read_json


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checkpoint's configuration, with the language model's part nested or flat.

    Attributes:
        model: as the user names it, for errors.
        data: all of the file.
        text: the language model's part.
    """

    model: str
    data: Mapping[str, Any]
    text: Mapping[str, Any]

    @classmethod
    def parse(cls, model: str, data: Mapping[str, Any]) -> ModelConfig:
        """Find the language model's part.

        Raises:
            ServiceError: MODEL_INVALID, it is not an object.
        """
        text = data.get("text_config") or data
        if not isinstance(text, Mapping):
            raise _invalid(model, f"text_config = {text!r} is not an object")
        return cls(model, data, text)

    @classmethod
    def open(cls, folder: Path, model: str) -> ModelConfig:
        """Read a folder's ``config.json``, and find the language model's part in it.

        Raises:
            ServiceError: MODEL_INVALID, the file is missing or not a configuration.
        """
        return cls.parse(model, read_json(folder, "config.json", model))

    @property
    def family(self) -> str:
        """``model_type``, supported or not."""
        return str(self.data.get("model_type"))

    @property
    def dtype(self) -> str:
        """The dtype of the weights, a key of ``DTYPE_BYTES``.

        Raises:
            ServiceError: MODEL_INVALID, it names another.
        """
        # Published Qwen3-VL configurations name it in the text's part only.
        parts = (self.data, self.text)
        named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
        dtype = next(filter(None, named), "float32")
        if dtype not in DTYPE_BYTES:
            expected = ", ".join(DTYPE_BYTES)
            raise _invalid(self.model, f"dtype = {dtype!r}; expected one of {expected}")
        return str(dtype)

    def size(self, key: str, default: int | None = None) -> int:
        """A number of the language model's part.

        Raises:
            ServiceError: MODEL_INVALID, it is missing and has no default, or is below 1.
        """
        value = self.text.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _invalid(self.model, f"{key} = {value!r}; expected a number of 1 or more")
        return value

    def shape(self) -> ModelShape:
        """The language model's sizes.

        Raises:
            ServiceError: MODEL_INVALID, naming the entry that is missing or not accepted.
        """
        heads = self.size("num_attention_heads")
        hidden = self.size("hidden_size")
        try:
            return ModelShape(
                name=Path(self.model).name or self.model,
                num_layers=self.size("num_hidden_layers"),
                hidden=hidden,
                intermediate=self.size("intermediate_size"),
                q_heads=heads,
                kv_heads=self.size("num_key_value_heads", heads),
                head_dim=self.size("head_dim", hidden // heads),
                dtype=self.dtype,
            )
        except ValueError as error:
            raise _invalid(self.model, str(error)) from error


def open_shape(model: str) -> ModelShape:
    """The shape of a checkpoint's folder. Needs its ``config.json`` only, no weights.

    Raises:
        ServiceError: MODEL_INVALID, if that file is missing or says something else.
    """
    return ModelConfig.open(Path(model).expanduser(), model).shape()


def _invalid(model: str, text: str) -> ServiceError:
    return ServiceError(Reason.MODEL_INVALID, f"{model}: {text}", model=model)
