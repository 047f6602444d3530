"""CPU back end: attention and products through oneDNN."""
