"""Arguments by which vLLM loads an FP8 checkpoint in full precision; needs no vLLM."""

from __future__ import annotations

DEQUANTIZE = "prefill_service_dequantize"
"""Name of ``fp8_loader``'s format, for vLLM's ``--load-format``."""

DEQUANTIZE_ARGUMENTS = (
    "--load-format",
    DEQUANTIZE,
    "--hf-overrides",
    '{"quantization_config": null}',
)
"""For ``vllm_server``, which knows the format. The second says that no layer is quantized."""
