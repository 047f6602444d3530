"""An hour of video: decoding, and a question about it."""
