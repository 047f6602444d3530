"""How transformers' own layers run on long videos: in pieces, packed, or in fewer operations."""
