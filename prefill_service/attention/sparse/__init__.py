"""Sparse attention: what is selected, and the back ends that attend to it."""
