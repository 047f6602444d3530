"""Fixtures of the command line's tests."""

from tests.scheduling.fixtures import serve, template

__all__ = ["serve", "template"]
