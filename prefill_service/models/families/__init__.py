"""Model families: what differs between them, one module each."""
