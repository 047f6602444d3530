"""Prefill of a long video on one GPU: the product's layers and attention beside dense attention.

``python -m benchmarks.gpu.prefill --help`` says how to run it, docs/results.md what it found.
"""
