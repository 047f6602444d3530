"""Speed of attention on one CPU rank: by itself, and within a prefill."""
