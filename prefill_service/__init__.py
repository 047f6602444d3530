"""prefill-service: sequence-parallel prefill of long videos for a stock vLLM."""

__version__ = "0.1.0"
