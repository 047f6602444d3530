"""Videos: storage, probing in a sandbox, decoding of chosen frames."""
