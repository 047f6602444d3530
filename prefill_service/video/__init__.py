"""Videos: storage, indexing in a sandbox, decoding of chosen frames."""
