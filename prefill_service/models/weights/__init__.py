"""The weights of a checkpoint's folder: what is there, whether it is whole, and FP8."""
