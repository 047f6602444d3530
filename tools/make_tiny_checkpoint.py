"""Build a tiny random checkpoint of a video language model, deterministically.

    python -m tools.make_tiny_checkpoint qwen3_vl build/checkpoints/qwen3_vl --layers 4

Real configuration, tokenizer, chat template, processors and weights (fp32), loadable by
transformers and vLLM like the published ones. The weights are random but scaled so that
greedy answers depend on the video and on the question. With the default processors two
minutes of 320x240 video give about 6,700 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import transformers

from prefill_service.compat import ensure_torchvision
from tools.tiny_families import FAMILIES, TinyFamily, TinySpec
from tools.tiny_tokenizer import SPECIAL_TOKENS, train_tokenizer

hf: Any = transformers  # its classes are untyped

RECIPE_FILE = "recipe.json"
RECIPE_VERSION = 3


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
        family: one of ``FAMILIES``.
        out: the checkpoint's folder; replaced if it holds another recipe's.
        seed: of the weights.
        **overrides: fields of ``TinySpec``.

    Raises:
        ValueError: no such family, or a shape it cannot have.
        FileExistsError: ``out`` exists and was not made by this tool.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    return build_family(FAMILIES[family], out, TinySpec(**overrides), seed=seed)


def build_family(family: TinyFamily, out: Path, spec: TinySpec, *, seed: int = 0) -> Path:
    """``build`` of a family that need not be one of ``FAMILIES``."""
    complete = family.complete(spec)
    recipe = {
        "version": RECIPE_VERSION,
        "family": family.model_type,
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
    tokenizer = train_tokenizer(family.template)
    model, processor = family.make(complete, tokenizer)
    spoken = _spoken(tokenizer, model.config.text_config.vocab_size, spec.any_token)
    _initialise(model, seed, family.gain, qk_gain=complete.qk_gain, spoken=spoken)
    model.config.dtype = "float32"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with _staged(out) as staging:
        model.save_pretrained(staging, save_original_format=family.published_names)
        tokenizer.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / RECIPE_FILE).write_text(text)
    return out


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place in one step, or is gone after an error."""
    hf.utils.logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


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
