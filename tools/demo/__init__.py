"""`make demo`: a real video through the real system, then the same questions to vLLM alone.

``story`` is what happens in the video and what is asked about it, ``picture`` draws where the
attention went, ``progress`` prints lines and tables.
"""
