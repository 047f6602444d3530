"""The ``demand`` exchange: only selected blocks travel."""
