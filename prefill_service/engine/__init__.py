"""The rank group: processes, the chunk pipeline, and the front end's view of them."""
