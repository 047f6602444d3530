"""Developer tools: checkpoints, videos, stubs, environment, demo."""
