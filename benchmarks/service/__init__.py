"""The whole service beside vLLM alone and transformers: what a user waits for."""
