"""Stories, their videos, and the prompts that training assembles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from prefill_service.config import VideoConfig
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.indexer import index_video
from tools.needle import checkpoint, sketches, stories, tower, videos
from tools.needle.stories import Needle, Story
from tools.needle.videos import SIDE, Look

ASSET = Path(__file__).resolve().parents[2] / "assets" / "needle-qwen3-vl"


@pytest.mark.parametrize("patches", [2, 3, 8, 16, 200])
def test_stories_are_consistent(patches: int) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        story = stories.sample_story(patches, rng)
        shown = [p for needle in story.needles for p in needle.patches]
        assert len(set(shown)) == len(shown)
        assert all(0 <= p < patches for p in shown)
        assert len({n.shape for n in story.needles}) == len(story.needles)
        assert len({n.color for n in story.needles}) == len(story.needles)
        assert all(len(n.patches) == 1 for n in story.needles[story.countable :])
        assert Counter(e.shape for e in story.events() if e) == {
            n.shape: len(n.patches) for n in story.needles
        }
        different = stories.distinct_questions(story, 3, rng)
        assert len(set(different)) == len(different) <= 12
        for question in [*stories.sample_questions(story, 12, rng), *different]:
            assert question.answer == answer_of(story, question.task, question.text)


def answer_of(story: Story, task: str, text: str) -> str:
    """The answer, found from the events alone."""
    words = text.rstrip("?").replace(",", "").split()
    events = [(i, e) for i, e in enumerate(story.events()) if e]
    if task == "color":
        return next(e.color for _, e in events if e.shape == words[-1])
    if task == "shape":
        return next(e.shape for _, e in events if e.color == words[-1])
    if task == "order":
        return next(e.shape for _, e in events if e.shape in words)
    return str(sum(e.shape in words for _, e in events))


def test_places_are_kept_and_too_few_refused() -> None:
    rng = np.random.default_rng(0)
    story = stories.sample_story(100, rng, places=[3, 50, 99])
    assert {p for n in story.needles for p in n.patches} <= {3, 50, 99}
    for patches, places in ((1, None), (100, [7, 7])):
        with pytest.raises(ValueError, match="a story needs 2"):
            stories.sample_story(patches, rng, places)


def test_videos_show_the_story(tmp_path: Path) -> None:
    story = Story(4, (Needle("square", "red", (1,)), Needle("circle", "cyan", (3,))), 0)
    empty = Story(4, (), 0)
    path = videos.write_mp4(tmp_path / "a.mp4", story, seed=5)
    frames = videos.read_frames(path)
    assert frames.shape == (8, SIDE, SIDE, 3)
    background = np.stack(list(videos.render(empty, np.random.default_rng(5))))
    drawn = np.stack(list(videos.render(story, np.random.default_rng(5))))
    changed = [(a != b).mean() > 0.05 for a, b in zip(drawn, background, strict=True)]
    assert changed == [False, False, True, True, False, False, True, True]
    assert np.abs(frames.astype(int) - drawn).mean() < 6  # the codec's loss
    center = drawn[2][np.abs(drawn[2].astype(int) - (225, 30, 30)).max(-1) <= 12]
    assert len(center) > 1000  # the square is red

    short = np.stack(list(videos.render(story, np.random.default_rng(5), look=Look(frames=1))))
    changed = [(a != b).any() for a, b in zip(short, background, strict=True)]
    assert changed == [False, False, True, False, False, False, True, False]
    faint = np.stack(list(videos.render(story, np.random.default_rng(5), look=Look(opacity=0.0))))
    assert np.array_equal(faint, background)
    assert len(list(videos.render(story, np.random.default_rng(5), fps=10))) == 40


def test_an_unknown_shape_is_refused() -> None:
    story = Story(2, (Needle("blob", "red", (0,)),), 0)
    with pytest.raises(ValueError, match="'blob' is not known"):
        list(videos.render(story, np.random.default_rng(0)))


async def test_layout_is_the_planners(tmp_path: Path) -> None:
    """Training's prompt is the one that the service plans from the mp4."""
    story = stories.sample_story(21, np.random.default_rng(1))
    path = videos.write_mp4(tmp_path / "a.mp4", story, seed=1)
    index = await index_video(path, VideoConfig())
    planner = PrefixPlanner(open_checkpoint(str(ASSET)), "float32")
    plan = planner.plan(index, "hash", FrameSampling(), "")
    _, tokenizer = checkpoint.load(ASSET)
    ours = sketches.layout(tokenizer, np.arange(21))
    assert plan.frame_indices.tolist() == list(range(42))
    assert plan.resized_hw == (SIDE, SIDE)
    assert ours.ids.tolist() == plan.token_ids.tolist()
    assert np.array_equal(ours.positions, plan.position_ids)
    assert ours.next == plan.num_tokens + plan.position_delta
    inner = plan.patch_ends[:-1]
    assert all(ours.patch[end - 1] == i for i, end in enumerate(inner))
    assert all(ours.patch[end] == i + 1 for i, end in enumerate(inner))


def test_features_are_the_processors_and_the_towers() -> None:
    model, tokenizer = checkpoint.load(ASSET)
    frames, _ = tower.clip(3)
    frames = frames[:5]
    inputs = checkpoint.processor(tokenizer).video_processor(
        [torch.from_numpy(frames.reshape(10, SIDE, SIDE, 3)).permute(0, 3, 1, 2)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    output = model.model.visual(
        inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"], return_dict=True
    )
    expected = [output.pooler_output, *output.deepstack_features]
    with torch.no_grad(), tower.batched(model):
        found = tower.features(model, torch.from_numpy(frames))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)
    assert "forward" not in model.model.visual.patch_embed.__dict__


def test_questions_side_by_side_are_questions_alone() -> None:
    """``predict`` against the model's own forward over each whole prompt."""
    model, tokenizer = checkpoint.load(ASSET)
    bank, labels = bank_of(model, 12)
    batches = sketches.Batches(tokenizer, bank, labels, torch.device("cpu"))
    batch = batches.make(
        6, 6, videos=2, questions=5, rng=np.random.default_rng(0), weights=(1, 1, 1, 1)
    )
    assert batch.weights.eq(1).all()
    with torch.no_grad():
        logits, _ = sketches.predict(model, batch)
        plan = batch.layout
        vision = torch.from_numpy(plan.vision)
        for number, (video, at) in enumerate(
            zip(batch.video.tolist(), batch.answer_at.tolist(), strict=True)
        ):
            start = at // batch.slot * batch.slot
            question = batch.questions[video, start : at + 1]
            ids = torch.cat([torch.from_numpy(plan.ids), question])
            embeds = model.get_input_embeddings()(ids)[None]
            embeds[0, : len(plan.ids)][vision] = batch.features[video, :, :, 0].flatten(0, 1)
            after = plan.next + torch.arange(len(question))
            positions = torch.cat([torch.from_numpy(plan.positions), after.expand(3, -1)], 1)
            deepstack = [batch.features[video, :, :, 1 + i].flatten(0, 1) for i in range(2)]
            hidden = model.model.language_model(
                inputs_embeds=embeds,
                position_ids=positions[:, None],
                visual_pos_masks=torch.cat([vision, torch.zeros(len(question)).bool()])[None],
                deepstack_visual_embeds=deepstack,
            ).last_hidden_state
            torch.testing.assert_close(
                logits[number], model.lm_head(hidden[0, -1]), atol=1e-3, rtol=1e-3
            )


def test_a_sketch_weighs_as_much_as_the_video() -> None:
    model, tokenizer = checkpoint.load(ASSET)
    bank, labels = bank_of(model, 12)
    batches = sketches.Batches(tokenizer, bank, labels, torch.device("cpu"))
    batch = batches.make(
        300, 20, videos=3, questions=4, rng=np.random.default_rng(0), weights=(1, 1, 1, 1)
    )
    whole = len(sketches.layout(tokenizer, np.arange(300)).ids)
    assert batch.weights.shape == (3, len(batch.layout.ids))
    assert ((batch.weights.sum(1) - whole).abs() / whole < 0.05).all()
    assert (batch.weights >= 1).all()
    with torch.no_grad():
        assert all(torch.isfinite(part).all() for part in sketches.predict(model, batch))


def test_a_weight_is_as_many_equal_tokens() -> None:
    """ln w on a key's score is w copies of the key: what sketches rest on."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 8, generator=rng, dtype=torch.float64)
    weights = torch.tensor([1, 3, 2, 1, 4])
    attend = torch.nn.functional.scaled_dot_product_attention
    sketched = attend(q, k, v, attn_mask=weights.log().to(q.dtype).expand(5, -1))
    copies = attend(q, k.repeat_interleave(weights, 2), v.repeat_interleave(weights, 2))
    torch.testing.assert_close(sketched, copies)


def bank_of(model: object, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    frames, labels = tower.clips(clips, 50, workers=1)
    with tower.batched(model):
        return tower.feature_bank(model, frames, torch.device("cpu")), labels
