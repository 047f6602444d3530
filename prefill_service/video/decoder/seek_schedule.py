"""The seek schedule: which frames to seek to, and how far to decode from each.

A frame can only be decoded from its GOP's keyframe on, so the cost of reading some frames
of a long video is the number of frames decoded on the way, not the number wanted. Reading
serially decodes everything. Seeking for each frame decodes the head of a GOP once per frame
wanted from it. The schedule groups the wanted frames by GOP, seeks once per group, and decodes
up to the group's last frame: no frame is decoded twice and none behind the last wanted one.
Going on into the next GOP needs no seek, so neighbouring GOPs share one seek where hardly a frame
lies between the last wanted one and the next keyframe; more than that is seeked over.

GOPs are cut in presentation order. A *leading* frame of an open GOP (shown before its
keyframe, sent after it, and predicted from the GOP before) therefore falls into the earlier
GOP, the only one it can be decoded from. Frames ahead of the first keyframe flag, as in a
file cut or edited in mid-GOP, belong to GOP 0, which always starts at the file's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEEK_FRAMES = 16
"""Decoding this many frames costs about as much as a seek in a container without an index."""


@dataclass(frozen=True, slots=True)
class Seek:
    """One seek, and the frames that are wanted after it.

    Attributes:
        gop: the GOP to start at; 0 means the beginning of the file.
        targets: wanted frames, ascending, without repeats.
    """

    gop: int
    targets: tuple[int, ...]


def gop_starts(keyframe: np.ndarray) -> np.ndarray:
    """[gops] int64: the first frame of each GOP; always starts with frame 0."""
    starts = np.flatnonzero(keyframe)
    return starts if len(starts) and starts[0] == 0 else np.concatenate(([0], starts))


def schedule_seeks(starts: np.ndarray, targets: Sequence[int]) -> list[Seek]:
    """Group ascending, distinct ``targets`` by the seek that each needs.

    Args:
        starts: [gops] int64, from ``gop_starts``.
        targets: frames wanted.
    """
    wanted = np.asarray(targets, np.int64)
    gops = np.searchsorted(starts, wanted, side="right") - 1
    unwanted = starts[gops[1:]] - wanted[:-1] - 1  # negative within a GOP
    cuts = np.flatnonzero(unwanted >= SEEK_FRAMES) + 1
    seeks = []
    for begin, end in zip([0, *cuts], [*cuts, len(targets)], strict=True):
        if begin < end:
            seeks.append(Seek(int(gops[begin]), tuple(int(t) for t in targets[begin:end])))
    return seeks
