"""Python SDK of prefill-service."""
