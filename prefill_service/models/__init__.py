"""What differs between checkpoints: planning prompts, and running transformers' own classes."""
