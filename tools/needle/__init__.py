"""A small video-question world with known answers, and the model trained to see it.

``stories`` says what happens in a video and what can be asked of it (a miniature VNBench:
retrieval, ordering, counting), ``videos`` renders it, ``checkpoint`` shapes the model, and
``perception`` and ``language`` train its two halves (``python -m tools.needle``).
"""
