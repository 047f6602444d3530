"""Fixtures of the service tests."""

from tests.scheduling.fixtures import serve, template

__all__ = ["serve", "template"]
