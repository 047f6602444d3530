"""What a checkpoint's configuration says of quantization: FP8 that is served, or a refusal.

Two layouts of FP8 are read: ``quant_method: fp8`` (DeepSeek's and Qwen's, the one that
transformers calls fine-grained) and ``compressed-tensors`` with 8-bit floats (llm-compressor's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefill_service.models.weights.refusal import refuse
from prefill_service.models.weights.safetensors_files import StoredTensor

FP8_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
FULL_PRECISION = ("F32", "BF16", "F16")

SUPPORTED = (
    "supported are float32, bfloat16 and float16 weights, and FP8 (e4m3) of quant_method fp8 or "
    "compressed-tensors"
)
_CONFIG = "config.json"
_ACTIVATION_SCALES = (".input_scale", ".activation_scale")
_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """How the FP8 weights of a checkpoint are stored.

    Attributes:
        method: ``quant_method`` of the configuration.
        block: rows and columns that have one scale; ``None`` for a scale of each row or tensor.
        scale_suffix: what follows a weight's name in the name of its scales.
        ignored: modules that the configuration says are not quantized; ``re:`` begins a pattern.
    """

    method: str
    block: tuple[int, int] | None
    scale_suffix: str
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        unit = "row or tensor" if self.block is None else f"{self.block[0]} x {self.block[1]} block"
        return f"FP8 with a scale for each {unit}"

    def scale_name(self, weight: str) -> str:
        """Name of the scales of the weight of that name."""
        return weight + self.scale_suffix

    def is_activation_scale(self, name: str) -> bool:
        """Whether it is a static scale of activations, which full precision does not use."""
        return name.endswith(_ACTIVATION_SCALES)


def quantization_of(config: Mapping[str, Any], model: str) -> Fp8Format | None:
    """The format of quantized weights; ``None`` if they are not quantized.

    Args:
        config: the checkpoint's ``config.json``.
        model: as the operator named it, for errors.

    Raises:
        ServiceError: MODEL_INVALID, naming the field and what is supported.
    """
    text = config.get("text_config")
    parts = {"": config, "text_config.": text if isinstance(text, Mapping) else {}}
    for prefix, part in parts.items():
        for key in ("quantization_config", "compression_config"):
            field = f"{prefix}{key}"
            if part.get(key) and field != "quantization_config":
                message = f"{field} is not read; expected quantization_config. {SUPPORTED}"
                raise refuse(model, _CONFIG, message, field=field)
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        text = f"quantization_config = {entry!r} is not an object"
        raise refuse(model, _CONFIG, text, field="quantization_config")
    return _Reader(entry, model).fp8_format()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one ``quantization_config``; errors name the field in it."""

    entry: Mapping[str, Any]
    model: str

    def fp8_format(self) -> Fp8Format:
        method = str(self.entry.get("quant_method"))
        if method == "fp8":
            return self._fine_grained()
        if method == "compressed-tensors":
            return self._compressed_tensors()
        raise self._refuse("quant_method", method)

    def _fine_grained(self) -> Fp8Format:
        entry = self.entry
        if entry.get("fmt") not in (None, "e4m3"):
            raise self._refuse("fmt", entry["fmt"])
        if entry.get("store_dtype") is not None:
            raise self._refuse("store_dtype", entry["store_dtype"])
        scheme = entry.get("activation_scheme", "dynamic")
        block = self._block(entry.get("weight_block_size"), "weight_block_size")
        if scheme != "dynamic" and (scheme != "static" or block is not None):
            raise self._refuse("activation_scheme", scheme)
        ignored = entry.get("ignored_layers") or entry.get("modules_to_not_convert")
        return Fp8Format(
            method="fp8",
            block=block,
            scale_suffix="_scale" if block is None else "_scale_inv",
            ignored=self._names(ignored, "modules_to_not_convert"),
        )

    def _compressed_tensors(self) -> Fp8Format:
        entry = self.entry
        for key in ("kv_cache_scheme", "transform_config"):
            if entry.get(key):
                raise self._refuse(key, entry[key])
        sparsity = entry.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise self._refuse("sparsity_config.format", sparsity["format"])
        groups = entry.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise self._refuse("config_groups", groups)
        blocks = {self._group_block(str(name), group) for name, group in groups.items()}
        if len(blocks) > 1:
            raise self._refuse("config_groups", "groups of different strategies")
        return Fp8Format(
            method="compressed-tensors",
            block=blocks.pop(),
            scale_suffix="_scale",
            ignored=self._names(entry.get("ignore"), "ignore"),
        )

    def _group_block(self, name: str, group: Any) -> tuple[int, int] | None:
        field = f"config_groups.{name}"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise self._refuse(f"{field}.weights", weights)
        accepted = {
            "num_bits": (8,),
            "type": ("float",),
            "symmetric": (True, None),
            "dynamic": (False, None),
            "strategy": _STRATEGIES,
        }
        for key, values in accepted.items():
            if weights.get(key) not in values:
                raise self._refuse(f"{field}.weights.{key}", weights.get(key))
        kind = group.get("format") or self.entry.get("format")
        if kind not in (None, "float-quantized", "naive-quantized"):
            raise self._refuse(f"{field}.format", kind)
        if group.get("output_activations"):
            raise self._refuse(f"{field}.output_activations", group["output_activations"])
        if weights["strategy"] != "block":
            return None
        return self._block(weights.get("block_structure"), f"{field}.weights.block_structure")

    def _block(self, value: Any, field: str) -> tuple[int, int] | None:
        if value is None and field == "weight_block_size":
            return None
        match value:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
        raise self._refuse(field, value)

    def _names(self, value: Any, field: str) -> tuple[str, ...]:
        names = [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._refuse(field, value)
        return tuple(names)

    def _refuse(self, field: str, value: object) -> Exception:
        name = f"quantization_config.{field}"
        return refuse(
            self.model, _CONFIG, f"{name} = {value!r} cannot be served; {SUPPORTED}", field=name
        )


def check_quantized_tensors(
    tensors: Mapping[str, StoredTensor], fp8: Fp8Format | None, model: str
) -> None:
    """Compare what is stored with what the configuration says.

    Raises:
        ServiceError: MODEL_INVALID for FP8 weights without scales of the right shape or without a
            configuration of them, and for scales or a configuration without FP8 weights.
    """
    quantized = {name: one for name, one in tensors.items() if one.dtype.startswith(("F8", "F4"))}
    if fp8 is None:
        for name, one in quantized.items():
            text = f"tensor {name!r} is {one.dtype}, but {_CONFIG} has no quantization_config"
            raise refuse(model, one.file, f"{text}; {SUPPORTED}", tensor=name)
        return
    scales: set[str] = set()
    for name, one in quantized.items():
        if name.endswith(fp8.scale_suffix):
            continue
        _check_weight(name, one, tensors, fp8=fp8, model=model)
        scales.add(fp8.scale_name(name))
    if not scales:
        text = f"quantization_config says {fp8.method}, but no tensor is {FP8_DTYPE}"
        raise refuse(model, _CONFIG, text, field="quantization_config")
    for name, one in tensors.items():
        if name.endswith(("weight_scale", "weight_scale_inv")) and name not in scales:
            text = f"tensor {name!r} are scales of a weight that is not {FP8_DTYPE}"
            raise refuse(model, one.file, text, tensor=name)
        if name.endswith((".k_scale", ".v_scale")):
            text = f"tensor {name!r} is a scale of an FP8 KV cache, which is not supported"
            raise refuse(model, one.file, text, tensor=name)


def _check_weight(
    name: str,
    weight: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    *,
    fp8: Fp8Format,
    model: str,
) -> None:
    if weight.dtype != FP8_DTYPE or not name.endswith(".weight") or len(weight.shape) != 2:
        text = f"tensor {name!r} is {weight.dtype} of shape {list(weight.shape)}"
        raise refuse(model, weight.file, f"{text}; {SUPPORTED}", tensor=name)
    if name.removesuffix(".weight") in fp8.ignored:
        text = f"tensor {name!r} is {FP8_DTYPE}, but {_CONFIG} says its module is not quantized"
        raise refuse(model, weight.file, text, tensor=name)
    scale = tensors.get(fp8.scale_name(name))
    if scale is None:
        text = f"tensor {name!r} is {FP8_DTYPE}, its scales {fp8.scale_name(name)!r} are missing"
        raise refuse(model, weight.file, text, tensor=name)
    rows, columns = weight.shape
    if fp8.block is None:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (rows,), (rows, 1))
    else:
        shapes = ((-(-rows // fp8.block[0]), -(-columns // fp8.block[1])),)
    if scale.dtype not in SCALE_DTYPES or scale.shape not in shapes:
        text = f"tensor {fp8.scale_name(name)!r} is {scale.dtype} of shape {list(scale.shape)}"
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        text += f"; a weight of shape {list(weight.shape)} needs {wanted} in a floating-point dtype"
        raise refuse(model, scale.file, text, tensor=fp8.scale_name(name))
