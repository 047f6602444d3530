"""The ``prefill`` command."""

import sys

from prefill_client.cli.commands import main as _main


def main() -> None:
    """Entry point of the ``prefill`` command."""
    sys.exit(_main())
