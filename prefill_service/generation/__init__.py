"""Generation by vLLM, launched and watched or given by URL, and requests to it."""
