"""What approximation costs in answers: accuracy of a trained model at every quality.

    make bench-fidelity
    python -m benchmarks.quality.fidelity --patches 64 256 --videos 5  # a quick look
    python -m benchmarks.quality.fidelity --checkpoint DIR --seed 7  # other weights, other videos

``rehearsal`` prefills in this process what R ranks would; ``scoring`` asks questions of it,
``service`` asks the whole service and vLLM alone, ``adversarial`` looks for the cases that fool
selection, ``results`` aggregates and draws.
"""
