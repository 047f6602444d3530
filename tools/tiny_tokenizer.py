"""A byte-level BPE tokenizer with the special tokens of the Qwen VL families, trained in place.

Small enough for checkpoints of a few megabytes, and like the real ones in every way the
service depends on: any text encodes and decodes, special tokens are single ids, the chat
template places the video in a user message.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 700
MAX_LENGTH = 131072
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
SPECIAL_TOKENS = (
    PADDING,
    "<|im_start|>",
    END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_TURNS = r"""{%- for message in messages -%}
%DEFAULT_SYSTEM%
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' -%}
{{- '%VIDEO%' -}}
{%- elif part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
_DEFAULT_SYSTEM = r"""{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}"""

_SENTENCES = (
    "What is happening in the video? Describe it in detail, please.",
    "How many people are there at the beginning and at the end of the clip?",
    "Which colour does the moving shape have, and when does it appear first?",
    "The camera turns slowly to the left while a second car stops near the open door.",
    "You are a helpful assistant. Answer with one short sentence about this scene.",
    "Explain why that could have been different, and what will come after some seconds.",
    "A small dog runs over green grass, then a child throws its red ball into the water.",
    "Between two houses an old man carries bread, fruit and flowers along the quiet street.",
    "They cook dinner together; she cuts onions, he stirs the soup and looks for salt.",
    "Nobody moves until the music starts again, later everyone dances under bright lights.",
    "It rains on the mountain road, so both drivers wait inside their yellow truck.",
    "Before noon three birds fly across the blue sky above white boats in the harbour.",
)


def chat_template(
    *, default_system: bool = False, video: str = "<|vision_start|><|video_pad|><|vision_end|>"
) -> str:
    """Jinja chat template.

    Args:
        default_system: a chat without a system message gets one.
        video: what stands for a video until the processor names its patches; as in a Jinja
            string, so a new line is ``\\n``.
    """
    system = _DEFAULT_SYSTEM + "\n" if default_system else ""
    return _TURNS.replace("%DEFAULT_SYSTEM%\n", system).replace("%VIDEO%", video)


def train_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a few sentences. Digits stay single, as in the real ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
