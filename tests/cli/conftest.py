"""Fixtures of the command line's tests."""

from tests.support.in_process_service import serve, template

__all__ = ["serve", "template"]
