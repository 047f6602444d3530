"""vLLM's KV connector: loads a prefix's pages into vLLM's cache."""
