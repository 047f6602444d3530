"""The needle model: a Qwen3-VL of 1.1 M parameters with its tokenizer and processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from prefill_service.compat import ensure_torchvision
from tools.needle.stories import (
    COLORS,
    SHAPES,
    Needle,
    color_question,
    count_question,
    order_question,
    shape_question,
)
from tools.needle.videos import SAMPLED_FPS, SIDE
from tools.tiny_tokenizer import END_OF_TURN, PADDING, SPECIAL_TOKENS, chat_template

hf: Any = transformers  # its classes are untyped

PATCH = 16
MERGE = 2
GRID = SIDE // PATCH
TOKENS_PER_PATCH = (GRID // MERGE) ** 2
"""Language-model tokens of a temporal patch."""

CONTEXT = 131072
VOCABULARY = 700


@dataclass(frozen=True, slots=True)
class NeedleSpec:
    """Shape of the language model; the vision tower has three layers of 64.

    Attributes:
        hidden: width; heads are 32 wide, two query heads to a KV head.
        layers: decoder layers.
        theta: base of the rotary embedding. Large: positions reach thousands of seconds.
    """

    hidden: int = 128
    layers: int = 4
    theta: float = 1e8


def build_tokenizer() -> Any:
    """Byte-level BPE in which every shape, colour and digit is one token.

    A timestamp ``<12.2 seconds>`` becomes ``<``, ``1``, ``2``, ``.2 seconds>``.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\.\d seconds>|\d| ?[A-Za-z]+|[^\sA-Za-z0-9]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=chat_template(),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def _corpus() -> list[str]:
    lines = []
    for shape in SHAPES:
        needle = Needle(shape, "red", (0,))
        for question in (color_question(needle), order_question(needle, needle)):
            lines.append(question.text)
        lines += [count_question(needle).text, shape, f" {shape}"]
    for color in COLORS:
        lines += [shape_question(Needle("star", color, (0,))).text, color, f" {color}"]
    lines += [f"<0.{digit} seconds>" for digit in range(10)]
    lines += ["user\n", "assistant\n", "system\n", "Describe the video.", " last", "Yes", "No"]
    return lines * 20


def word_ids(tokenizer: Any, words: tuple[str, ...]) -> torch.Tensor:
    """Ids of words that are one token each, [words].

    Raises:
        ValueError: a word that is several.
    """
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, found in zip(words, ids, strict=True):
        if len(found) != 1:
            raise ValueError(f"{word!r} is {len(found)} tokens, not one")
    return torch.tensor([found[0] for found in ids])


def build_model(tokenizer: Any, spec: NeedleSpec, seed: int) -> Any:
    """A ``Qwen3VLForConditionalGeneration`` with fresh weights.

    The usual standard deviation of 0.02 suits wide models; here it is 1/sqrt(fan in). A word has
    the same embedding with and without a space before it, and the vision tower is trained to
    speak these embeddings before the language model learns to read them.
    """
    ensure_torchvision()
    torch.manual_seed(seed)
    model = hf.Qwen3VLForConditionalGeneration(_config(tokenizer, spec)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            std = parameter[0].numel() ** -0.5
            if "pos_embed" in name:
                std = 0.2
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * spec.layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        embeddings = model.get_input_embeddings().weight
        words = (*SHAPES, *COLORS)
        spaced = word_ids(tokenizer, tuple(f" {word}" for word in words))
        embeddings[spaced] = embeddings[word_ids(tokenizer, words)]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(PADDING)
    model.generation_config.do_sample = False
    return model


def _config(tokenizer: Any, spec: NeedleSpec) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    config = hf.Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "hidden_size": spec.hidden,
            "intermediate_size": 2 * spec.hidden,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.hidden // 32,
            "num_key_value_heads": max(1, spec.hidden // 64),
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            "bos_token_id": ids(PADDING),
            "eos_token_id": ids(END_OF_TURN),
            "pad_token_id": ids(PADDING),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": spec.theta,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": spec.hidden,
            "num_position_embeddings": GRID * GRID,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.dtype = "float32"
    return config


def processor(tokenizer: Any) -> Any:
    """Qwen3-VL's processor: two frames per second, small frames left as they are."""
    patches: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**patches, **half),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(
            **patches,
            do_sample_frames=True,
            fps=SAMPLED_FPS,
            max_frames=4096,
            cap_pixels_per_frame=False,
            # Pixels of the whole video: 4,096 frames keep their size.
            size={"shortest_edge": 4096, "longest_edge": 4096 * SIDE * SIDE},
            **half,
        ),
        chat_template=tokenizer.chat_template,
    )


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the checkpoint as published ones are: bfloat16 weights, tokenizer, processors."""
    folder.mkdir(parents=True, exist_ok=True)
    share_tenths(model, tokenizer)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    half = hf.Qwen3VLForConditionalGeneration(model.config).to(torch.bfloat16)
    half.load_state_dict(state)
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor(tokenizer).save_pretrained(folder)


@torch.no_grad()
def share_tenths(model: Any, tokenizer: Any) -> None:
    """Give all tenths of a second the embedding of the only one that training sees.

    Its frames are at whole and half seconds, so that every timestamp ends in ``.2``. Of videos with
    other rates the frames nearest to those times are taken, and timestamps end in any tenth.
    """
    tenths = word_ids(tokenizer, tuple(f".{digit} seconds>" for digit in range(10)))
    embeddings = model.get_input_embeddings().weight
    embeddings[tenths] = embeddings[tenths[2]].clone()


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32, and tokenizer, of a folder that ``save`` wrote."""
    ensure_torchvision()
    model = hf.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, hf.AutoTokenizer.from_pretrained(folder)


def mean(folders: list[Path]) -> tuple[Any, Any]:
    """A model whose weights are the mean of several checkpoints' ("model soup", arXiv 2203.05482).

    Raises:
        ValueError: checkpoints of other shapes.
    """
    model, tokenizer = load(folders[0])
    state = {name: value.double() for name, value in model.state_dict().items()}
    for folder in folders[1:]:
        for name, value in load(folder)[0].state_dict().items():
            if name not in state or state[name].shape != value.shape:
                raise ValueError(f"{folder}: {name} is not as in {folders[0]}")
            state[name] += value.double()
    model.load_state_dict({name: value / len(folders) for name, value in state.items()})
    return model, tokenizer
