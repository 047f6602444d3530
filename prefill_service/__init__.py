"""prefill-service: sequence-parallel prefill of long videos for a stock vLLM decoder."""

__version__ = "0.1.0"
