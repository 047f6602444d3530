"""The sandboxed decoder process and what runs inside it."""
