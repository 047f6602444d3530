"""Answers to questions: from a prefix, the text after it, and vLLM, to a stream of events."""
