"""Build a tiny random checkpoint of a video language model, deterministically.

    python -m tools.make_tiny_checkpoint qwen3_vl build/checkpoints/qwen3_vl --layers 4

Real configuration, tokenizer, chat template, processors and weights (fp32), loadable by
transformers and vLLM like the published ones. The weights are random but scaled so that
greedy answers depend on the video and on the question. With the default processors two
minutes of 320x240 video give about 6,700 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import transformers

from prefill_service.compat import ensure_torchvision
from tools.tiny_tokenizer import (
    END_OF_TURN,
    PADDING,
    SPECIAL_TOKENS,
    chat_template,
    train_tokenizer,
)

hf: Any = transformers  # its classes are untyped

RECIPE_FILE = "recipe.json"
RECIPE_VERSION = 3
GAIN = {"qwen3_vl": 2.0, "qwen2_5_vl": 1.6}
"""Scale of the random weights: sharp enough attention to tell thousands of tokens apart,
little enough chaos that fp32 rounding does not show."""


@dataclass(frozen=True, slots=True)
class TinySpec:
    """Shape of a tiny checkpoint.

    Attributes:
        layers: decoder layers.
        hidden: width of the decoder.
        heads, kv_heads: query and key/value heads; their ratio is the GQA group.
        head_dim: width of a head. Qwen2.5-VL derives it, so there hidden = heads x head_dim.
        max_position_embeddings: context in tokens.
        video_tokens: ceiling of the default processor, vision tokens of a video (Qwen3-VL)
            or of a temporal patch (Qwen2.5-VL); 0 is 6144 and 50.
        any_token: answers are made of any byte and not of words only, so that a character can
            be cut between two tokens.
        intermediate: width of the decoder's MLP; 0 is twice ``hidden``.
        vision_depth: blocks of the vision tower; 0 is 4 (Qwen3-VL) or 3 (Qwen2.5-VL).
        vision_hidden, vision_intermediate, vision_heads: of the vision tower.
        qk_gain: scale of the query and key norms' weights (Qwen3-VL); attention logits grow with
            its square. 0 is the family's ``GAIN``.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 65536
    video_tokens: int = 0
    any_token: bool = False
    intermediate: int = 0
    vision_depth: int = 0
    vision_hidden: int = 128
    vision_intermediate: int = 256
    vision_heads: int = 4
    qk_gain: float = 0.0

    def validate(self, family: str) -> None:
        """Raise ValueError if no model of ``family`` has this shape."""
        if family not in FAMILIES:
            raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if family == "qwen2_5_vl" and self.hidden != self.heads * self.head_dim:
            raise ValueError(
                f"{family} needs hidden = heads x head_dim, "
                f"not {self.hidden} != {self.heads} x {self.head_dim}"
            )
        if self.vision_hidden % (4 * self.vision_heads):
            raise ValueError(
                f"vision_hidden {self.vision_hidden} is not a multiple of 4 x vision_heads "
                f"{self.vision_heads}, as the rotary embedding of rows and columns needs"
            )


def _text_config(spec: TinySpec, tokenizer: Any, rope: dict[str, Any]) -> dict[str, Any]:
    end, padding = tokenizer.convert_tokens_to_ids([END_OF_TURN, PADDING])
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate or 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": padding,
        "eos_token_id": end,
        "pad_token_id": padding,
        "tie_word_embeddings": False,
    }


def _vision_config(spec: TinySpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_intermediate,
        "num_heads": spec.vision_heads,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": spec.hidden,
    }


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _deepstack(depth: int, layers: int) -> list[int]:
    """Blocks whose features join the decoder's first layers: evenly spread over a deep tower."""
    count = min(3, layers, depth)
    if depth < 8:
        return list(range(count))
    return [depth * (1 + i) // 3 - 1 for i in range(count)]


def _qwen3_vl(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    pairs = spec.head_dim // 2
    side = pairs * 5 // 16
    depth = spec.vision_depth or 4
    config = hf.Qwen3VLConfig(
        text_config={
            **_text_config(
                spec,
                tokenizer,
                {
                    "rope_theta": 5e6,
                    "mrope_section": [pairs - 2 * side, side, side],
                    "mrope_interleaved": True,
                },
            ),
            "head_dim": spec.head_dim,
        },
        vision_config={
            **_vision_config(spec),
            "depth": depth,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": _deepstack(depth, spec.layers),
        },
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    patches: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**patches, **half),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(
            **patches,
            do_sample_frames=True,
            fps=2,
            cap_pixels_per_frame=False,
            # Pixels of the whole video: a token covers 32 x 32 pixels of two frames.
            size={
                "shortest_edge": 4 * 32 * 32,
                "longest_edge": (spec.video_tokens or 6144) * 2 * 32 * 32,
            },
        ),
        chat_template=tokenizer.chat_template,
    )
    return hf.Qwen3VLForConditionalGeneration(config), processor


def _qwen2_5_vl(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    pairs = spec.head_dim // 2
    side = pairs * 3 // 8
    depth = spec.vision_depth or 3
    config = hf.Qwen2_5_VLConfig(
        text_config=_text_config(
            spec,
            tokenizer,
            {"rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]},
        ),
        vision_config={
            **_vision_config(spec),
            "depth": depth,
            "patch_size": 14,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [depth - 1],
        },
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    patches: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        # Neither samples frames nor names a rate by default, like the published checkpoints.
        video_processor=hf.Qwen2VLVideoProcessor(
            **patches,
            cap_pixels_per_frame=False,
            # Pixels of a frame: a token covers 28 x 28 pixels.
            size={
                "shortest_edge": 4 * 28 * 28,
                "longest_edge": (spec.video_tokens or 50) * 28 * 28,
            },
        ),
        chat_template=tokenizer.chat_template,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[TinySpec, Any], tuple[Any, Any]]] = {
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}


@torch.no_grad()
def _initialise(
    model: torch.nn.Module, seed: int, gain: float, *, qk_gain: float, spoken: torch.Tensor
) -> None:
    """Random weights; ``spoken`` [vocabulary] fp32 scales the output rows, 0 is never said."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(qk_gain * (1 + 0.1 * noise))
        elif parameter.dim() < 2:
            parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise)
        elif name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * (gain / sqrt(parameter[0].numel())))
    head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    head.weight.mul_(spoken[:, None])


def _spoken(tokenizer: Any, vocab_size: int, any_token: bool) -> torch.Tensor:
    """Which ids answers are made of: words, or with ``any_token`` every byte. Ends are rare."""
    weights = torch.zeros(vocab_size)
    for token, index in tokenizer.get_vocab().items():
        word = len(token) > 1 and token.removeprefix("\u0120").isalpha()
        weights[index] = token not in SPECIAL_TOKENS and (word or any_token)
    weights[tokenizer.eos_token_id] = 0.5
    return weights


def build(family: str, out: Path, seed: int = 0, **overrides: Any) -> Path:
    """Build the checkpoint at ``out``, or return at once if the same one is there.

    Args:
        family: ``"qwen3_vl"`` or ``"qwen2_5_vl"``.
        out: the checkpoint's folder; replaced if it holds another recipe's.
        seed: of the weights.
        **overrides: fields of ``TinySpec``.

    Raises:
        ValueError: no such family, or a shape it cannot have.
        FileExistsError: ``out`` exists and was not made by this tool.
    """
    spec = TinySpec(**overrides)
    spec.validate(family)
    recipe = {
        "version": RECIPE_VERSION,
        "family": family,
        "seed": seed,
        "transformers": transformers.__version__,
        **dataclasses.asdict(spec),
    }
    text = json.dumps(recipe, indent=2) + "\n"
    if out.exists():
        marker = out / RECIPE_FILE
        if not marker.is_file():
            raise FileExistsError(f"{out} exists and is no checkpoint of this tool")
        if marker.read_text() == text:
            return out
    ensure_torchvision()
    template = chat_template(default_system=family == "qwen2_5_vl")
    tokenizer = train_tokenizer(template)
    model, processor = FAMILIES[family](spec, tokenizer)
    vocab_size = model.config.text_config.vocab_size
    gain = GAIN[family]
    spoken = _spoken(tokenizer, vocab_size, spec.any_token)
    _initialise(model, seed, gain, qk_gain=spec.qk_gain or gain, spoken=spoken)
    model.config.dtype = "float32"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    hf.utils.logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / RECIPE_FILE).write_text(text)
        staging.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(TinySpec):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(
                flag, type=type(field.default), default=field.default, help="%(default)s"
            )
    arguments = vars(parser.parse_args())
    try:
        print(build(arguments.pop("family"), arguments.pop("out"), **arguments))
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
