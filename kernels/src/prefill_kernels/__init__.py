"""Triton kernels, each beside its naive PyTorch reference; for CPUs, what goes through oneDNN.

Imports torch and triton only.
"""
