"""`examples/evaluate_scenes.py`: its prompts, its intervals, and one run on the emoji model."""

import json

import pytest
from helpers import import_example, run_example


scenes = import_example("evaluate_scenes.py")


@pytest.fixture(scope="module")
def sprites():
    tasks = scenes.EmojiTasks(scenes.load_rows(quick=True), scenes=0)
    return scenes.draw_things(tasks)


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_real_scenes_are_right_and_other_scenes_are_not(category, sprites):
    judge = scenes.SceneJudge(sprites)
    prompts = scenes.make_prompts(category, 5)
    images = [scenes.draw_scene(scene, sprites) for _, scene in prompts]
    assert all(scenes.is_right(judge, image, scene, category) for image, (_, scene) in zip(images, prompts))
    shifted = [*images[1:], images[0]]
    wrong = [scenes.is_right(judge, image, scene, category) for image, (_, scene) in zip(shifted, prompts)]
    different = [
        {*scene.things} - {*other.things} for (_, scene), (_, other) in zip(prompts, prompts[1:] + prompts[:1])
    ]
    assert not any(right for right, things in zip(wrong, different) if things)


def test_prompts_say_what_their_scenes_hold():
    for category in scenes.CATEGORIES:
        for text, scene in scenes.make_prompts(category, 20):
            assert all(thing in text or scenes.make_plural(thing) in text for thing in scene.things)
            assert scene.color == "white"
            held_out = category in ("two_objects", "counting", "position", "attribute_binding")
            assert scene.is_held_out or not held_out


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_prompts_differ(category):
    """Repeated prompts would make the intervals too narrow; some categories have few held-out combinations."""
    prompts = scenes.make_prompts(category, scenes.PROMPTS)
    assert len({text for text, _ in prompts}) == len(prompts) > 10
    assert prompts == scenes.make_prompts(category, scenes.PROMPTS)


def test_the_relation_counts(sprites):
    judge = scenes.SceneJudge(sprites)
    left, right = (scenes.Scene(("cat", "dog"), relation=relation) for relation in ("left", "right"))
    image = scenes.draw_scene(left, sprites)
    assert scenes.is_right(judge, image, left, "position")
    assert not scenes.is_right(judge, image, right, "position")
    assert scenes.is_right(judge, image, right, "two_objects")


@pytest.mark.parametrize(
    "right, count, low, high",  # scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    [(0, 10, 0.0, 27.75), (5, 10, 23.66, 76.34), (93, 100, 86.25, 96.57), (100, 100, 96.30, 100.0)],
)
def test_intervals(right, count, low, high):
    assert scenes.wilson_interval(right, count) == pytest.approx((low, high), abs=0.02)


@pytest.mark.slow
def test_the_emoji_model_on_12_prompts(tmp_path):
    done = run_example("evaluate_scenes.py", "--limit", "12", "--output", tmp_path / "scenes.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scenes.json").read_text())
    assert [*result] == [*scenes.CATEGORIES, "overall"]
    for category in scenes.CATEGORIES:
        low, high = result[category]["interval"]
        assert low <= result[category]["score"] <= high and result[category]["prompts"] == 2
        assert result[category]["judge_on_real_scenes"] == 100
