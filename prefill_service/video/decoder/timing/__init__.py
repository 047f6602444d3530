"""When each frame is shown: timestamps, joins of recordings, and the clock measured from them."""
