"""Edge-disjoint Hamiltonian cycles: rings that together use every directed link once.

A single ring uses n of the n (n - 1) directed links between n ranks. Where the complete directed
graph falls apart into n - 1 Hamiltonian cycles, n - 1 rings at once use all of them in every step
(TASP, arXiv 2509.26541). It does for every n but 4 and 6 (Tillson, 1980). Odd n by Walecki's
construction, each undirected cycle in both directions; n = 8 from a table that a search found;
larger even n, which no full mesh of links connects today, are left out.
"""

from __future__ import annotations

_EIGHT = (
    (0, 5, 6, 3, 7, 2, 1, 4),
    (0, 4, 2, 3, 5, 7, 1, 6),
    (0, 3, 2, 7, 5, 4, 6, 1),
    (0, 7, 6, 2, 4, 1, 5, 3),
    (0, 6, 7, 4, 3, 1, 2, 5),
    (0, 2, 6, 5, 1, 3, 4, 7),
    (0, 1, 7, 3, 6, 4, 5, 2),
)


def hamiltonian_cycles(ranks: int) -> list[list[int]]:
    """Cycles over ``ranks``, each as the ranks in the order in which data visits them.

    Returns:
        ``ranks - 1`` edge-disjoint cycles where they are known, otherwise one ring.

    Raises:
        ValueError: fewer than two ranks.
    """
    if ranks < 2:
        raise ValueError(f"a cycle needs at least 2 ranks, got {ranks}")
    if ranks == 8:
        return [list(cycle) for cycle in _EIGHT]
    if ranks % 2 == 0:
        return [list(range(ranks))]
    around = ranks - 1  # the ranks on Walecki's circle; the last one is its hub
    zigzag = [(step + 1) // 2 * (1 if step % 2 else -1) for step in range(around)]
    cycles = []
    for turn in range(around // 2):
        cycle = [around, *((turn + step) % around for step in zigzag)]
        cycles += [cycle, cycle[::-1]]
    return cycles
