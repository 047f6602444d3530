"""Fixtures of the service tests."""

from tests.support.in_process_service import serve, template

__all__ = ["serve", "template"]
