"""Generated stubs of the prefill.v1 API. Do not edit; see tools/generate_stubs.py."""
