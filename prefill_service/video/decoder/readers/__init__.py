"""Readers of video frames, one module per library."""
