"""M-RoPE positions by vLLM's formula.

transformers 5.19 and vLLM 0.32 disagree for Qwen2.5-VL once a video's temporal extent exceeds
its spatial one: transformers continues the text at ``start + max(h, w)``, vLLM (and the model's
authors) at ``max(all positions) + 1``. vLLM decodes, so its formula is the one to prefill with;
tests compare these functions with vLLM's own.
"""

from __future__ import annotations

import numpy as np


def mrope_positions(
    token_ids: np.ndarray,
    video_token_id: int,
    block_thw: tuple[int, int, int],
    t_factor: float,
) -> tuple[np.ndarray, int]:
    """Positions of a prompt whose vision tokens come in equal blocks.

    Text counts on from the largest position so far; a vision block starts there too, and its
    token (t, h, w) sits at ``start + (int(t * t_factor), h, w)`` (Qwen2-VL, arXiv 2409.12191,
    section 2.1).

    Args:
        token_ids: [tokens].
        video_token_id: id of a vision token.
        block_thw: merged grid of one block: the whole video for Qwen2.5-VL, one temporal patch
            for Qwen3-VL, which separates patches by timestamps.
        t_factor: positions per temporal patch.

    Returns:
        positions [3, tokens] int64, and the delta: next position minus number of tokens.

    Raises:
        ValueError: the vision tokens do not come in runs of ``t * h * w``.
    """
    block = np.indices(block_thw, dtype=np.int64).reshape(3, -1)  # [3, t*h*w]
    block[0] = (block[0] * t_factor).astype(np.int64)
    extent = int(block.max()) + 1
    size = block.shape[1]

    positions = np.empty((3, len(token_ids)), np.int64)
    next_position = 0
    cursor = 0
    is_video = np.concatenate([token_ids == video_token_id, [False]])
    starts = np.flatnonzero(is_video[:-1] & ~np.concatenate([[False], is_video[:-2]]))
    for start in starts:
        text = int(start) - cursor
        positions[:, cursor:start] = next_position + np.arange(text)
        next_position += text
        end = int(start) + size
        if not is_video[start:end].all() or is_video[end]:
            raise ValueError(f"the vision tokens at {start} are not one block of {size}")
        positions[:, start:end] = next_position + block
        next_position += extent
        cursor = end
    text = len(token_ids) - cursor
    positions[:, cursor:] = next_position + np.arange(text)
    return positions, next_position + text - len(token_ids)
