"""Model families: one module each, which holds an instance of its ``Family`` as ``FAMILY``."""
