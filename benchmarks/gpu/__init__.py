"""What is to be measured and checked on a GPU; ``benchmarks.gpu_check`` runs all of it."""
