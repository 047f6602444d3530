"""Triton kernels, each beside its naive PyTorch reference. Imports torch and triton only."""
