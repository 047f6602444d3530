"""Queue of prefill jobs, resident prefixes, and the flow of an answer."""
