"""Build the larger random checkpoint that `make bench-service` compares systems on.

    python -m tools.make_bench_checkpoint build/checkpoints/bench-qwen3-vl

Qwen3-VL with eight decoder layers of 512: eight query heads and two KV heads of 128, the width in
every published Qwen3-VL (all query heads together are twice as wide as the decoder, as in
Qwen3-0.6B), and an MLP three times as wide (as in Qwen3-VL-8B). The vision tower is as deep as the
8B's, 27 blocks, and so narrow that it costs per video token, beside its decoder, between what the
8B's and the 4B's do. ``--proportions`` prints
both models' work per token. Tokenizer, processors and weights are those of
``tools.make_tiny_checkpoint``; so is the scale of the weights, but for attention's: see
``QK_GAIN``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from tools.make_tiny_checkpoint import build

FAMILY = "qwen3_vl"
QK_GAIN = 1.05
"""At which `balanced` keeps somewhat more keys than of the trained needle model's prompts of that
length (docs/results.md). Random attention at the usual scale is far less sparse."""

MERGE = 4
"""Patches of the vision tower per token of the language model."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and depths that decide how work is shared between tower and decoder.

    Attributes:
        layers, hidden, intermediate, q_width, kv_width: of the decoder; the widths of all query
            heads and of all key heads.
        vision_layers, vision_hidden, vision_intermediate: of the tower.
        mergers: patch mergers, those of the deep-stack features included.
    """

    layers: int
    hidden: int
    intermediate: int
    q_width: int
    kv_width: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    mergers: int = 4

    @property
    def decoder_flops(self) -> int:
        """Of the linear layers, per token."""
        attention = 2 * self.hidden * (self.q_width + self.kv_width)
        return 2 * self.layers * (attention + 3 * self.hidden * self.intermediate)

    def vision_flops(self, patches: int) -> int:
        """Of the whole tower, per token of the decoder, with so many patches to a frame."""
        width = self.vision_hidden
        linear = 4 * width**2 + 2 * width * self.vision_intermediate
        attention = 2 * patches * width
        merged = MERGE * width
        mergers = self.mergers * (merged**2 + merged * self.hidden)
        return 2 * (MERGE * self.vision_layers * (linear + attention) + mergers)

    def proportion(self, patches: int) -> float:
        """Work of the tower over that of the decoder's linear layers."""
        return self.vision_flops(patches) / self.decoder_flops


PUBLISHED = {
    "Qwen3-VL-8B": Shape(
        layers=36,
        hidden=4096,
        intermediate=12288,
        q_width=4096,
        kv_width=1024,
        vision_layers=27,
        vision_hidden=1152,
        vision_intermediate=4304,
    ),
    "Qwen3-VL-4B": Shape(
        layers=36,
        hidden=2560,
        intermediate=9728,
        q_width=4096,
        kv_width=1024,
        vision_layers=24,
        vision_hidden=1024,
        vision_intermediate=4096,
    ),
}
"""From the published configurations."""

LARGER = Shape(
    layers=8,
    hidden=512,
    intermediate=1536,
    q_width=1024,
    kv_width=256,
    vision_layers=27,
    vision_hidden=48,
    vision_intermediate=180,
)


def build_larger(out: Path, seed: int = 0) -> Path:
    """Build the checkpoint at ``out``, or return at once if it is there.

    Raises:
        FileExistsError: ``out`` exists and was not made by this tool.
    """
    return build(
        FAMILY,
        out,
        seed,
        layers=LARGER.layers,
        hidden=LARGER.hidden,
        heads=8,
        kv_heads=2,
        head_dim=128,
        intermediate=LARGER.intermediate,
        vision_depth=LARGER.vision_layers,
        vision_hidden=LARGER.vision_hidden,
        vision_intermediate=LARGER.vision_intermediate,
        vision_heads=1,
        qk_gain=QK_GAIN,
        max_position_embeddings=131072,
        video_tokens=131072,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proportions", action="store_true", help="print the work per token")
    arguments = parser.parse_args()
    if arguments.proportions:
        for name, shape in {**PUBLISHED, "this one": LARGER}.items():
            shares = ", ".join(
                f"{shape.proportion(n):.2f} at {n} patches" for n in (256, 768, 1024)
            )
            print(f"{name}: decoder {shape.decoder_flops / 1e6:,.1f} MFLOP, tower {shares}")
        return
    if arguments.out is None:
        parser.error("the folder to build is missing")
    try:
        print(build_larger(arguments.out, arguments.seed))
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
