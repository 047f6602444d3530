"""The ``prefill-service`` command."""
