"""What every family must satisfy: the registered ones, and one that is added in a single file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefill_service.errors import Reason, ServiceError
from prefill_service.models import families
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.families.base import Family, VisionInput
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.frame_sampling import FrameSampler
from prefill_service.models.pixels import FramePreprocessor
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex
from tests.models.toy_family import SPEC, TINY, ToyFamily
from tests.oracles.transformers_forward import load, prefix_cache, prefix_kv, processor_inputs
from tests.oracles.transformers_greedy import generate, greedy
from tools.make_tiny_checkpoint import build_family

TOY = ToyFamily.model_type
NAMES = [*FAMILIES, TOY]
CPU = torch.device("cpu")


def index_of(frames: int, width: int = 160, height: int = 120) -> VideoIndex:
    pts = np.arange(frames)
    return VideoIndex(
        container="mp4",
        codec="h264",
        geometry=Geometry.square(width, height, frames),
        time_base=(1, 4),
        pts=pts,
        keyframe=pts % 10 == 0,
        times_s=pts / 4,
        fps=4.0,
        duration_s=frames / 4,
    )


def pixels_of(plan: PrefixPlan, index: VideoIndex) -> np.ndarray:
    """[frames, height, width, 3] of noise for the plan's frames."""
    size = (len(plan.frame_indices), index.height, index.width, 3)
    return np.random.default_rng(len(plan.frame_indices)).integers(0, 255, size, dtype=np.uint8)


def stack(video: np.ndarray) -> Tensor:
    return torch.from_numpy(video).permute(0, 3, 1, 2)


@dataclass
class Subject:
    """A family under test, with a tiny checkpoint of it."""

    family: Family
    planner: PrefixPlanner

    @property
    def path(self) -> Path:
        return self.planner.checkpoint.path

    @property
    def processor(self) -> Any:
        return load(self.path, torch.float32)[1]

    def plan(self, frames: int, sampling: FrameSampling | None = None) -> PrefixPlan:
        sampling = sampling or FrameSampling(fps=2.0)
        return self.planner.plan(index_of(frames), "sha", sampling, "")

    def parts(self, plan: PrefixPlan, patches: int) -> Iterator[VisionInput]:
        """The plan's frames, preprocessed so many temporal patches at a time."""
        preprocess = FramePreprocessor(self.family, self.processor.video_processor, plan.resized_hw)
        video = pixels_of(plan, index_of(1))
        step = patches * preprocess.frames_per_patch
        for start in range(0, len(video), step):
            yield preprocess(list(video[start : start + step]))

    def whole(self, plan: PrefixPlan) -> dict[str, Any]:
        """The family's processor on prompt and video at once."""
        index = index_of(2 * len(plan.frame_indices))
        text = self.planner.chat.prefix("")
        return processor_inputs(self.path, pixels_of(plan, index), plan, index, text=text)


@pytest.fixture(scope="module", params=NAMES)
def subject(
    request: pytest.FixtureRequest,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Subject]:
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == TOY:
            patch.setitem(FAMILIES, TOY, ToyFamily())
            path = build_family(TINY, tmp_path_factory.mktemp("toy") / "model", SPEC)
        else:
            path = checkpoint(name)
        yield Subject(FAMILIES[name], PrefixPlanner(open_checkpoint(str(path)), "float32"))


def test_every_family_is_tested_once() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_the_registry_is_the_folder() -> None:
    folder = Path(families.__path__[0])
    named = {path.stem for path in folder.glob("*.py") if "\nFAMILY = " in path.read_text()}
    assert named == FAMILIES.keys()
    assert all(name == family.model_type for name, family in FAMILIES.items())


# ---- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [2, 9, 64])
def test_the_plan_is_what_the_processor_makes_of_the_whole_video(
    subject: Subject, frames: int
) -> None:
    plan = subject.plan(frames)
    whole = subject.whole(plan)
    assert plan.token_ids.tolist() == whole["input_ids"][0].tolist()
    assert plan.num_video_tokens == int((plan.token_ids == plan.video_token_id).sum())
    grid = plan.patch_grid
    model = load(subject.path, torch.float32)[0]
    assert np.prod(grid) == plan.num_video_tokens * subject.family.patches_per_token(model.config)


@pytest.mark.parametrize("frames", [1, 2, 9, 64])
def test_the_layout_covers_the_prefix(subject: Subject, frames: int) -> None:
    plan = subject.plan(frames)
    vision = plan.token_ids == plan.video_token_id
    patches = len(plan.patch_ends)
    assert plan.patch_grid[0] == patches
    assert patches == -(-len(plan.frame_indices) // subject.planner.sampler.frames_per_patch)
    assert np.all(np.diff(plan.patch_ends) > 0)
    assert plan.patch_ends[-1] == plan.num_tokens
    owned = np.add.reduceat(vision, np.concatenate([[0], plan.patch_ends[:-1]]))
    assert np.all(owned == plan.num_video_tokens // patches)
    offset, length = plan.placeholder
    assert not vision[:offset].any()
    assert not vision[offset + length :].any()
    assert plan.position_ids.shape[1] == plan.num_tokens
    assert plan.position_ids.max() + 1 == plan.num_tokens + plan.position_delta


@pytest.mark.parametrize("frames", [2, 9])
def test_positions_are_transformers_own(subject: Subject, frames: int) -> None:
    """Short videos only: of long ones vLLM's formula differs for Qwen2.5-VL (``mrope``)."""
    plan = subject.plan(frames)
    model = load(subject.path, torch.float32)[0].model
    expected = np.arange(plan.num_tokens)[None]
    if hasattr(model, "get_rope_index"):
        whole = subject.whole(plan)
        known = {
            name: whole[name]
            for name in ("input_ids", "attention_mask", "video_grid_thw", "second_per_grid_ts")
            if name in whole
        }
        known["mm_token_type_ids"] = 2 * (whole["input_ids"] == plan.video_token_id).int()
        expected = model.get_rope_index(**known)[0][:, 0].numpy()
    assert np.array_equal(plan.position_ids, expected)


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (FrameSampling(fps=0.0), "fps is 0.0"),
        (FrameSampling(num_frames=0), "num_frames is 0"),
        (FrameSampling(fps=1.0, num_frames=4), "exclude each other"),
        (FrameSampling(min_pixels=10_000, max_pixels=5_000), "min_pixels 10000"),
    ],
)
def test_sampling_that_cannot_be_applied_is_named(
    subject: Subject, sampling: FrameSampling, named: str
) -> None:
    with pytest.raises(ServiceError, match=named) as caught:
        subject.plan(20, sampling)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_an_estimate_is_near_the_plan(subject: Subject) -> None:
    sampling = FrameSampling(fps=2.0)
    estimate = subject.planner.estimate_tokens(index_of(600), sampling)
    assert 0.5 < estimate / subject.plan(600, sampling).num_tokens < 2


def test_what_is_suggested_does_fit(subject: Subject) -> None:
    sampler: FrameSampler = subject.planner.sampler
    full = subject.plan(600, FrameSampling()).num_tokens
    sentence = sampler.suggest_fit(index_of(600), FrameSampling(), full // 3)
    frames = int(sentence.split("num_frames=")[1].split()[0])
    fitted = subject.plan(600, FrameSampling(num_frames=frames)).num_tokens
    assert full // 6 < fitted <= full // 3 + 20


# ---- pixels and the tower --------------------------------------------------------------------


@pytest.mark.parametrize("patches", [1, 3])
def test_preprocessing_in_parts_is_the_processors_of_the_whole(
    subject: Subject, patches: int
) -> None:
    plan = subject.plan(18)
    video = stack(pixels_of(plan, index_of(1)))
    processed = subject.processor.video_processor(
        [video],
        do_sample_frames=False,
        return_tensors="pt",
        **subject.planner.sampler.size_kwargs(FrameSampling()),
    )
    whole = subject.family.vision_input(processed)
    parts = list(subject.parts(plan, patches))
    assert len(parts) == -(-len(plan.patch_ends) // patches)
    (pixels,) = (name for name in whole if name.startswith("pixel_values"))
    assert torch.equal(torch.cat([part[pixels] for part in parts]), whole[pixels])


@pytest.mark.parametrize("mlp_chunk_tokens", [0, 24])
def test_prefill_in_chunks_is_transformers_forward(subject: Subject, mlp_chunk_tokens: int) -> None:
    """Vision tower, positions and every layer's keys and values, on chunks of two patches."""
    plan = subject.plan(18)
    expected = prefix_kv(subject.path, subject.whole(plan), plan)
    model = PrefillModel(subject.planner.checkpoint, torch.float32, CPU, mlp_chunk_tokens)
    kept = KeptKV(model.shape.num_layers)
    start = 0
    for part, end in zip(subject.parts(plan, 2), chunk_ends(plan, 2), strict=True):
        model.prefill(
            plan.token_ids[start:end],
            plan.position_ids[:, start:end],
            plan.video_token_id,
            features=[model.encode(part)],
            kv=kept,
        )
        start = end
    torch.testing.assert_close(kept.all(), expected, atol=2e-4, rtol=1e-4)


def test_greedy_tokens_by_the_plans_positions_are_transformers_generate(subject: Subject) -> None:
    """Checks the oracle of ``tests/generation``, on a video so short that positions agree."""
    planner = subject.planner
    plan = subject.plan(9)
    chat = [("user", "what happens?")]
    prompt = planner.prompt_token_ids(plan, chat)
    index = index_of(9)
    text = planner.chat.render("", chat, add_generation_prompt=True)
    inputs = processor_inputs(subject.path, pixels_of(plan, index), plan, index, text=text)
    assert inputs["input_ids"][0].tolist() == prompt
    cache = prefix_cache(subject.path, subject.whole(plan), plan)
    tokens = greedy(subject.path, cache, prompt, plan, new_tokens=4)
    assert tokens == generate(subject.path, inputs, 4)


def chunk_ends(plan: PrefixPlan, patches: int) -> list[int]:
    """Where each chunk of so many temporal patches ends."""
    ends = [int(end) for end in plan.patch_ends]
    return sorted({*ends[patches - 1 :: patches], ends[-1]})


class KeptKV:
    """A ``LayerKV`` that keeps all chunks and attends to them causally."""

    def __init__(self, layers: int) -> None:
        self._k: list[list[Tensor]] = [[] for _ in range(layers)]
        self._v: list[list[Tensor]] = [[] for _ in range(layers)]

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._k[layer].append(k.clone())
        self._v[layer].append(v.clone())

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        k, v = (torch.cat(x[layer]).transpose(0, 1) for x in (self._k, self._v))
        queries = q.shape[1]
        causal = torch.ones(queries, k.shape[1], dtype=torch.bool).tril(k.shape[1] - queries)
        return scaled_dot_product_attention(q, k, v, attn_mask=causal, scale=scale, enable_gqa=True)

    def all(self) -> Tensor:
        """[layers, 2, tokens, kv_heads, head_dim]."""
        layers = zip(self._k, self._v, strict=True)
        return torch.stack([torch.stack([torch.cat(k), torch.cat(v)]) for k, v in layers])
