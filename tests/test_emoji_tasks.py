"""The emoji conversations, scenes and images, and what training never sees of them."""

import copy
import math
import random
import re
import sys
from itertools import chain

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import EXAMPLES_FOLDER, import_example

from metamorph_hf import VPiTConfig


train = import_example("train_emoji.py")
evaluate_emoji = import_example("evaluate_emoji.py")
emoji_images, emoji_scenes, emoji_tasks, emoji_words = (
    import_example(f"emoji.{name}") for name in ("images", "scenes", "tasks", "words")
)
CYCLES, TONES = emoji_tasks.CYCLES, emoji_tasks.TONES
HELD_OUT_PHRASINGS, MIXTURE = emoji_tasks.HELD_OUT_PHRASINGS, emoji_tasks.MIXTURE
UNDERSTANDING, MuonAdamW = emoji_tasks.UNDERSTANDING, import_example("emoji.optimizer").MuonAdamW
PartialImageTrainer = train.PartialImageTrainer
SHOWING_AN_IMAGE = ("name", "category", "yes_no", "thinking", "reconstruction", "edit_tone", "edit_style")
ASKING_FOR_AN_IMAGE = ("text_to_image", "style", "scene")


@pytest.fixture(scope="module")
def rows():
    return emoji_images.load_rows()


@pytest.fixture(scope="module")
def tasks(rows):
    return emoji_tasks.EmojiTasks(rows)


@pytest.fixture(scope="module")
def quick():
    return emoji_tasks.EmojiTasks(emoji_images.load_rows(quick=True), scenes=40)


@pytest.fixture(scope="module")
def samples(tasks):
    rng = random.Random(5)
    return {task: [tasks.sample(task, rng) for _ in range(3_000)] for task in MIXTURE}


@pytest.fixture(scope="module")
def things(quick):
    """The sprites of all things that scenes have."""
    return emoji_images.draw_things(quick)


def texts(record):
    return [part["text"] for turn in record["messages"] for part in turn["content"] if part["type"] == "text"]


def scene_of(record, tasks):
    return tasks.scenes[record["images"][0] - len(tasks.rows)]


class TestSamples:
    def test_every_image_part_has_an_image(self, samples, tasks):
        count = len(tasks.rows) + len(tasks.scenes) + len(tasks.bases)
        for record in chain.from_iterable(samples.values()):
            parts = [part for turn in record["messages"] for part in turn["content"]]
            assert len(record["images"]) == sum(part["type"] == "image" for part in parts)
            assert all(0 <= image < count for image in record["images"])

    def test_texts_are_complete(self, samples):
        for text in chain.from_iterable(texts(record) for record in chain.from_iterable(samples.values())):
            assert text
            assert not set("{}<>") & set(text), text

    def test_answers(self, samples, rows, tasks):
        for record in samples["name"]:
            assert texts(record)[1] == rows[record["images"][0]]["name"]
        for record in samples["thinking"]:
            image, crop = record["images"]
            assert crop == tasks.crop_of[image]
            assert texts(record)[1] == rows[image]["name"]
        for record in samples["text_to_image"]:
            row = rows[record["images"][0]]
            assert row["style"] == "google" or ("google", row["base"], "") not in tasks.index
        for record in samples["edit_tone"]:
            source, target = (rows[image] for image in record["images"])
            assert (source["style"], source["base"]) == (target["style"], target["base"])
            assert source["skin_tone"] != target["skin_tone"]
            request = texts(record)[0].replace("?", "").replace(",", "")
            named = max((tone for tone in TONES if tone in request.split()), default="")
            assert named == target["skin_tone"]
        for record in samples["edit_style"]:
            source, target = (rows[image] for image in record["images"])
            assert (source["base"], source["skin_tone"]) == (target["base"], target["skin_tone"])
            assert source["style"] != target["style"] and target["style"].capitalize() in texts(record)[0]

    def test_what_is_said_before_an_image(self, samples, tasks):
        talking = copy.copy(tasks)
        talking.say_first = True
        for task, records in samples.items():
            rng, silent = random.Random(task), random.Random(task)
            for _ in records[:200]:
                record, expected = talking.sample(task, rng), tasks.sample(task, silent)
                answer = record["messages"][1]["content"]
                if expected["messages"][1]["content"][-1]["type"] == "image":
                    assert answer.pop(0) == {"type": "text", "text": tasks.caption(record["images"][-1])}
                assert record == expected

    def test_captions(self, tasks):
        assert tasks.caption(tasks.index["google", "1F34E", ""]) == "red apple"
        caption = tasks.caption(tasks.index["twitter", "1F44B", "dark"])
        assert caption == "waving hand, dark skin tone, in Twitter's style"
        for number, scene in enumerate(tasks.scenes[:200]):
            caption = tasks.caption(len(tasks.rows) + number)
            assert caption.startswith(scene.things[0] if len(scene.things) == 1 or scene.is_pair else ("two", "three"))
            assert caption.endswith(f", {scene.color} background")
            assert not scene.is_pair or f"{emoji_scenes.RELATIONS[scene.relation]} {scene.things[1]}," in caption

    def test_answers_about_scenes(self, samples, tasks):
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        for record in samples["scene_question"]:
            scene, (question, answer) = scene_of(record, tasks), texts(record)
            if "color" in question:
                assert answer == scene.color
            elif scene.is_pair:
                relation = next(key for key, words in emoji_scenes.RELATIONS.items() if words in question)
                asked = next(thing for thing in scene.things if question.rstrip("?").endswith(f"the {thing}"))
                other = next(thing for thing in scene.things if thing != asked)
                assert answer == other
                assert relation == (scene.relation if asked == scene.things[1] else opposite[scene.relation])
            else:
                assert answer == ("one", "two", "three")[len(scene.things) - 1]

    def test_yes_and_no_are_balanced(self, samples):
        answers = [texts(record)[1] for record in samples["yes_no"]]
        assert 0.45 < answers.count("yes") / len(answers) < 0.55

    def test_default_phrasing_is_the_most_common(self, samples):
        prompts = [texts(record)[0] for record in samples["text_to_image"]]
        assert 0.12 < sum(prompt.startswith("Generate an image of ") for prompt in prompts) / len(prompts) < 0.2
        assert sum(len(prompt.split()) for prompt in prompts) / len(prompts) < 10

    def test_same_seed_same_record(self, tasks):
        for task in MIXTURE:
            assert tasks.sample(task, random.Random(3)) == tasks.sample(task, random.Random(3))

    def test_unknown_task_names_the_known_ones(self, tasks):
        with pytest.raises(ValueError, match="'poem'.*text_to_image, style, scene"):
            tasks.sample("poem", random.Random(0))


class TestNothingLeaks:
    def test_held_out_phrasings(self):
        rng = random.Random(7)
        held_out = [emoji_tasks.normalize(phrasing) for phrasing in HELD_OUT_PHRASINGS]
        for _ in range(20_000):
            prompt = emoji_tasks.normalize(emoji_tasks.sample_request(rng))
            assert prompt.count("{}") == 1
            assert not any(phrasing in prompt for phrasing in held_out), prompt

    @pytest.mark.parametrize("phrasing", HELD_OUT_PHRASINGS)
    def test_held_out_phrasings_are_recognized_in_disguise(self, phrasing):
        assert emoji_tasks.is_held_out(phrasing)
        assert emoji_tasks.is_held_out(f"Hello! {phrasing.upper().replace('{}', 'a {}')} Thanks")
        assert not emoji_tasks.is_held_out(emoji_tasks.DEFAULT_PHRASING)

    def test_held_out_keywords(self, tasks):
        """No caption holds one, by whole words."""
        words = tasks.words
        assert len(words.held_out) == int(0.1 * len(words.owners))
        captions = {*words.names.values(), *chain(*words.everyday.values()), *chain(*words.captions.values())}
        rng = random.Random(2)
        captions |= {words.choose_phrase(base, rng) for base in words.names for _ in range(20)}
        for caption in captions:
            parts = re.findall(r"[\w'-]+", caption)
            spans = {" ".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
            assert not spans & words.held_out, caption

    def test_held_out_twitter_images(self, samples, tasks, rows):
        for record in chain.from_iterable(samples[task] for task in (*SHOWING_AN_IMAGE, "style", "sequence")):
            for row in (rows[image] for image in record["images"] if image < len(rows)):
                assert row["style"] != "twitter" or row["base"] not in tasks.held_out_images

    def test_pairs(self, samples, tasks, rows):
        for image in chain.from_iterable(record["images"] for record in chain.from_iterable(samples.values())):
            if image < len(rows):
                assert (rows[image]["base"], rows[image]["skin_tone"]) not in tasks.held_out_pairs

    def test_sequence_starts(self, samples, tasks, rows):
        steps = set()
        for record in samples["sequence"]:
            bases = [rows[image]["base"] for image in record["images"]]
            cycle = next(cycle for cycle, order in CYCLES.items() if bases[0] in order)
            indices = [CYCLES[cycle].index(base) for base in bases]
            (step,) = {
                (after - before) % len(CYCLES[cycle]) for before, after in zip(indices, indices[1:], strict=False)
            }
            steps.add((cycle, step))
            assert step != 1 or indices[0] not in tasks.held_out_starts[cycle]
        assert steps == {("moon", 1), ("moon", 7), ("clock", 1), ("clock", 23)}

    def test_combinations_in_scenes(self, tasks):
        """A pair is held out in either order, in all colors and relations."""

        def combination(scene):
            if len(set(scene.things)) == 2:
                return frozenset(scene.things)
            return (*scene.things, scene.color) if len(scene.things) == 1 else scene.things

        kinds = ("scene_color", "scene_count", "scene_pair", "scene_binding")
        held_out = {combination(record["answer"]) for kind in kinds for record in tasks.evaluation(kind)}
        trained = {combination(scene) for scene in tasks.scenes}
        assert len(held_out) > 100 and not held_out & trained

    def test_visualizer_never_sees_twitters_held_out_images(self, tasks, rows):
        images = train.choose_visualizer_images(tasks)
        assert len(images) > len(rows) / 2
        chosen = [rows[image] for image in images if image < len(rows)]
        assert not any(row["style"] == "twitter" and row["base"] in tasks.held_out_images for row in chosen)
        assert {row["style"] for row in chosen} == set(emoji_tasks.STYLES)


class TestEvaluation:
    @pytest.mark.parametrize(
        ("kind", "size"),
        [
            ("seen_phrasings", 1925),
            ("unseen_phrasings", 1925),
            ("held_out_keywords", 329),
            ("name_google", 1925),
            ("name_twitter_held_out", 200),
            ("category_twitter_held_out", 200),
            ("edit_held_out", 100),
            ("sequence_held_out", 24),
            ("scene_color", 100),
            ("scene_count", 100),
            ("scene_pair", 100),
            ("scene_binding", 100),
        ],
    )
    def test_size_and_form(self, tasks, kind, size):
        records = tasks.evaluation(kind)
        assert len(records) == size
        for record in records:
            (turn,) = record["messages"]
            assert turn["role"] == "user"
            assert len(record["images"]) == sum(part["type"] == "image" for part in turn["content"])

    def test_held_out_answers(self, tasks, rows):
        for record in tasks.evaluation("edit_held_out"):
            answer = rows[record["answer"]]
            assert (answer["base"], answer["skin_tone"]) in tasks.held_out_pairs
            assert rows[record["images"][0]]["skin_tone"] == ""
        for record in tasks.evaluation("name_twitter_held_out"):
            assert rows[record["images"][0]]["style"] == "twitter"
            assert record["answer"] == rows[record["images"][0]]["name"]
        for record in tasks.evaluation("held_out_keywords"):
            keyword = texts(record)[0].removeprefix("Generate an image of ").removesuffix(".")
            assert record["answer"]
            assert all(keyword in rows[image]["keywords"] for image in record["answer"])

    def test_everyday_prompts_name_emoji(self, tasks):
        prompts = yaml.safe_load(evaluate_emoji.EVERYDAY_PROMPTS.read_text(encoding="utf-8"))
        assert len(prompts) >= 150
        assert {name for names in prompts.values() for name in names.split("|")} <= set(tasks.names)

    def test_unknown_kind(self, tasks):
        with pytest.raises(ValueError, match="no evaluation called 'all'"):
            tasks.evaluation("all")


class TestWords:
    def test_everyday_phrases_are_of_emoji(self, tasks):
        everyday = yaml.safe_load((EXAMPLES_FOLDER / "emoji" / "everyday.yaml").read_text(encoding="utf-8"))
        assert len(everyday) > 800
        assert set(everyday) <= set(tasks.names)

    @pytest.mark.parametrize(
        ("noun", "article", "plural"),
        [
            ("apple", "an", "apples"),
            ("unicorn", "a", "unicorns"),
            ("hourglass", "an", "hourglasses"),
            ("one-piece swimsuit", "a", "one-piece swimsuits"),
            ("t-rex", "a", "t-rexes"),
            ("strawberry", "a", "strawberries"),
            ("key", "a", "keys"),
            ("mouse", "a", "mice"),
            ("tomato", "a", "tomatoes"),
            ("fish", "a", "fish"),
            ("rubber duck", "a", "rubber ducks"),
            ("octopus", "an", "octopuses"),
        ],
    )
    def test_articles_and_plurals(self, noun, article, plural):
        assert emoji_words.indefinite_article(noun) == article
        assert emoji_words.make_plural(noun) == plural
        with_article = {emoji_words.add_article(noun, random.Random(seed)) for seed in range(20)}
        assert with_article == {f"{article} {noun}", f"the {noun}"}

    def test_plurals_take_no_indefinite_article(self):
        said = {emoji_words.add_article("grapes", random.Random(seed)) for seed in range(9)}
        assert said == {"some grapes", "the grapes"}

    def test_articles_that_are_there_stay(self):
        assert emoji_words.add_article("the moon", random.Random(0)) == "the moon"

    def test_sentences_say_what_emoji_mean(self, quick):
        """In any order, all of them, the held-out keywords included."""
        sentences = " ".join(quick.words.sentences(random.Random(0)))
        assert all(name in sentences for name in quick.words.names.values())
        assert quick.words.held_out and all(keyword in sentences for keyword in quick.words.held_out)


def test_mixtures_add_up():
    assert sum(MIXTURE.values()) == pytest.approx(1)
    assert sum(UNDERSTANDING.values()) == pytest.approx(1)
    assert set(UNDERSTANDING) < set(MIXTURE)


def test_corpus_has_names_and_conversations(quick, monkeypatch):
    monkeypatch.setattr(emoji_tasks, "CORPUS_CONVERSATIONS", 500)
    lines = list(emoji_tasks.corpus(quick))
    assert {row["name"] for row in quick.rows} <= set(lines)
    assert len(lines) > 500 and any(line.startswith("Generate an image of ") for line in lines)


class TestImages:
    def test_ids_are_unique(self, rows):
        assert len({(row["style"], row["code"]) for row in rows}) == len(rows)

    def test_one_by_one_as_all_together(self, quick, monkeypatch, tmp_path):
        """Rows, scenes and center crops, rendered and read from the cache."""
        monkeypatch.setattr(emoji_images, "CACHE", tmp_path)
        small = emoji_tasks.EmojiTasks(quick.rows, scenes=3)
        keep = sorted({0, 5, *small.bases[:3], *small.sprite_rows.values()})
        rendered = {}

        def render_few(svg, size):
            """Render what the test looks at."""
            if svg not in needed:
                return torch.zeros(size, size, 4, dtype=torch.uint8).numpy()
            return rendered.setdefault(svg, render(svg, size))

        render, needed = emoji_images.render, {small.rows[row]["svg"] for row in keep}
        monkeypatch.setattr(emoji_images, "render", render_few)
        crops = [small.crop_of[image] for image in small.bases[:3]]
        numbers = [*keep[:6], *range(len(small.rows), len(small.rows) + 3), *crops]
        together = emoji_images.load_images(small)
        assert together.shape == (len(small.rows) + 3 + len(small.bases), 3, 128, 128)
        again = emoji_images.load_images(small)
        monkeypatch.undo()
        assert torch.equal(together, again)
        assert torch.equal(together[numbers], emoji_images.draw_images(small, numbers))

    def test_premultiplied_opacity(self):
        """A half transparent red square on the left; placed on blue, plain alpha blending."""
        svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#f00" '
        sprite = torch.from_numpy(emoji_images.render(svg + 'fill-opacity="0.5"/></svg>', 8)).permute(2, 0, 1)
        placed = emoji_images.place_on(sprite[None], (0, 0, 255))[0]
        assert placed[:, 4, 6].tolist() == [0, 0, 255]
        torch.testing.assert_close(placed[:, 4, 1].float(), torch.tensor([127.5, 0, 127.5]), atol=1.0, rtol=0)

    def test_missing_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(SystemExit, match=r'resvg-py, which is not installed: pip install "\.\[emoji\]"'):
            emoji_images.render_png("<svg/>")


class TestScenes:
    def test_real_scenes_are_right_and_wrong_ones_are_not(self, things):
        judge, rng = emoji_scenes.SceneJudge(things), random.Random(11)
        kinds = ("color", "count", "pair", "binding")
        scenes = [emoji_scenes.sample_scene(rng, held_out=True, kind=kinds[i % 4]) for i in range(40)]
        right = 0
        for scene in scenes:
            found = judge.judge(emoji_scenes.draw_scene(scene, things), scene)
            assert found.keys() == {"objects", "color", "relation" if scene.is_pair else "count"}
            right += all(found.values())
        assert right >= 38

        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        for scene in scenes[:12]:
            things_here, color = scene.things, "purple" if scene.color != "purple" else "green"
            # Other objects on another background, and the same objects in another number or order.
            other = emoji_scenes.Scene(tuple({"key": "sun"}.get(thing, "key") for thing in things_here), color)
            found = judge.judge(emoji_scenes.draw_scene(other, things), scene)
            assert not found["objects"] and not found["color"]
            if scene.is_pair:
                other = emoji_scenes.Scene(things_here, scene.color, opposite[scene.relation])
            else:
                other = emoji_scenes.Scene(things_here[:1] * (len(things_here) % 3 + 1), scene.color)
            found = judge.judge(emoji_scenes.draw_scene(other, things), scene)
            assert found["color"] and not found["relation" if scene.is_pair else "count"]

    def test_correlation_is_the_plain_one(self, things):
        """The correlation of all pixels of all channels, less each channel's mean, at one position after another."""
        few = {word: things[word] for word in ("cat", "key")}
        judge, size, side = emoji_scenes.SceneJudge(few), 40, 20
        scene = emoji_scenes.Scene(("cat", "key"), "blue", "left")
        image = emoji_scenes.draw_scene(scene, things)
        found = judge.correlate(image, size)
        half = image.double().reshape(3, 64, 2, 64, 2).mean((2, 4)) / 255
        background = torch.tensor(emoji_scenes.COLORS["blue"], dtype=torch.float64).view(3, 1, 1) / 255
        for index, sprite in enumerate(few.values()):
            small = torch.nn.functional.interpolate(sprite[None].double(), size=(side, side), mode="area")[0] / 255
            template = small[:3] + background * (1 - small[3:])
            template = template - template.mean((1, 2), keepdim=True)
            for row, column in ((0, 0), (22, 6), (21, 5), (44, 44), (10, 30), (22, 38)):
                window = half[:, row : row + side, column : column + side]
                window = window - window.mean((1, 2), keepdim=True)
                # Nearly plain places count as having a little contrast, so that noise does not correlate.
                scales = [max(0.05, values.square().mean().sqrt().item()) for values in (window, template)]
                expected = (window * template).mean().item() / (scales[0] * scales[1])
                assert found[index, row, column].item() == pytest.approx(expected, abs=1e-4)

    def test_words_of_one_sprite_are_one(self, things):
        """A heart is a red heart, whichever of the words the prompt has."""
        judge = emoji_scenes.SceneJudge(things)
        for word in ("heart", "red heart"):
            scene = emoji_scenes.Scene((word, "blue square"), "white", "above")
            assert all(judge.judge(emoji_scenes.draw_scene(scene, things), scene).values())

    @pytest.mark.parametrize("color", emoji_scenes.COLORS)
    def test_background_is_that_of_most_of_the_border(self, color):
        image = torch.tensor(emoji_scenes.COLORS[color]).view(3, 1, 1).repeat(1, 128, 128).byte()
        image[:, :, :20] = 0 if color == "white" else 255  # something reaches over one side
        assert emoji_scenes.name_background(image) == color

    def test_words(self):
        scene = emoji_scenes.Scene(("cat", "owl"), "orange", "above")
        said = {emoji_tasks.describe_scene(scene, random.Random(seed)) for seed in range(30)}
        assert "a cat above an owl on an orange background" in said
        assert all(text.startswith("a cat above an owl ") for text in said)
        assert emoji_tasks.describe_scene(emoji_scenes.Scene(("cherry",) * 2), random.Random(1)) == "two cherries"


class TestMeasures:
    @pytest.fixture
    def images(self):
        return torch.randint(256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0)).byte()

    def test_borders(self, images):
        at_border, elsewhere = [], []
        for image in images.int().tolist():
            for channel in image:
                lines = [*channel, *map(list, zip(*channel, strict=True))]
                for line in lines:
                    for i in range(23):
                        (at_border if i in (7, 15) else elsewhere).append(abs(line[i + 1] - line[i]))
        expected = (sum(at_border) / len(at_border)) / (sum(elsewhere) / len(elsewhere))
        assert evaluate_emoji.measure_borders(images) == pytest.approx(expected, rel=1e-5)
        steps = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
        steps[..., 8:16] = 100  # the only steps are at borders
        assert evaluate_emoji.measure_borders(steps) == float("inf")

    def test_sharpness(self, images):
        values = []
        for image in images.int().tolist():
            for c in image:
                for y in range(1, 23):
                    for x in range(1, 23):
                        values.append(abs(c[y - 1][x] + c[y + 1][x] + c[y][x - 1] + c[y][x + 1] - 4 * c[y][x]))
        assert evaluate_emoji.measure_sharpness(images) == pytest.approx(sum(values) / len(values), rel=1e-5)

    def test_psnr(self, images):
        other = images.flip(-1)
        errors = ((images.double() - other.double()) ** 2).mean((1, 2, 3)).numpy()
        expected = sum(10 * math.log10(255**2 / error) for error in errors) / 2
        assert evaluate_emoji.measure_psnr(images, other) == pytest.approx(expected, rel=1e-5)

    def test_average_of_verdicts(self):
        verdicts = [{"objects": True, "count": False}, {"objects": False, "relation": True}]
        assert evaluate_emoji.average(verdicts) == {"objects": 50, "count": 0, "relation": 100}


class TestTrainingStream:
    """The training data that `train_emoji.py` builds from the records."""

    def test_quoted_words_have_the_tokens_of_unquoted_ones(self):
        tokenizer = train.build_tokenizer(
            ['show me "a kangaroo" now', "a kangaroo, an otter's ear", "'oden' for me"] * 5
        )
        plain = tokenizer.tokenize("show kangaroo")
        for text in ('show "kangaroo"', "show 'kangaroo'", 'show "Kangaroo" now'):
            assert plain[-1] in tokenizer.tokenize(text)
        assert tokenizer.decode(tokenizer("an otter's ear").input_ids).strip() == "an otter's ear"

    def test_look_alikes(self):
        tokens = torch.nn.functional.normalize(
            torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        near = tokens[0] + 0.1 * tokens[1]
        same = tokens[2].clone()  # identical images cannot be told apart, so there is nothing to learn
        found = train.find_look_alikes(torch.cat([tokens, near[None], same[None]]))
        assert found.nonzero().flatten().tolist() == [0, 8]

    def test_emphasis(self):
        tasks = emoji_tasks.EmojiTasks(emoji_images.load_rows(quick=True), scenes=1)
        tasks.emphasis = [50.0 if rank == 7 else 1.0 for rank in range(len(tasks.bases))]
        rng = random.Random(0)
        targets = [tasks.sample("text_to_image", rng)["images"][-1] for _ in range(4000)]
        expected = 4000 * 0.88 * 50 / (len(tasks.bases) + 49)
        assert abs(targets.count(tasks.bases[7]) - expected) < 4 * expected**0.5

    def test_questions_show_views_and_answers_the_image(self, quick):
        """Each visual token tells its view and image."""
        count = len(quick.rows) + len(quick.scenes) + len(quick.bases)
        views = torch.stack([torch.stack([torch.full((count,), v), torch.arange(count)], -1) for v in range(3)])

        def look_up(view, image, task):
            assert task in ("edit_tone", "thinking")
            return views[view, image][None]

        arguments = (quick, {"edit_tone": 1, "thinking": 1}, 64, 8, "visual_tokens", look_up, 3)
        stream = emoji_tasks.training_stream(*arguments)
        asked, answered = [], []
        for record in stream:
            numbers = [tokens.squeeze().tolist() for tokens in record["visual_tokens"]]
            in_question = sum(part["type"] == "image" for part in record["messages"][0]["content"])
            asked += numbers[:in_question]
            answered += numbers[in_question:]
        assert {view for view, _ in asked} == {0, 1, 2} and {view for view, _ in answered} == {0}
        again = emoji_tasks.training_stream(*arguments)
        assert [t.tolist() for t in stream[5]["visual_tokens"]] == [t.tolist() for t in again[5]["visual_tokens"]]

    def test_views_have_noise_and_number_0_is_the_image(self):
        generator = torch.Generator().manual_seed(0)
        views = torch.nn.functional.normalize(torch.randn(2, 5, 3, 16, generator=generator), dim=-1)
        assert torch.equal(train.show(views, 0, 4, "name"), views[0, 4])
        noisy = train.show(views, 7, 4, "name")
        torch.testing.assert_close(noisy.norm(dim=-1), torch.ones(3))
        cosine = torch.cosine_similarity(noisy, views[1, 4], dim=-1)
        assert (cosine > 0.75).all() and (cosine < 1).all()
        assert torch.equal(noisy, train.show(views, 7, 4, "name"))


class TestMuonAdamW:
    @staticmethod
    def build() -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)])
        return torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({"layers": layers}), "head": torch.nn.Linear(4, 3)})

    @staticmethod
    def halve(optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Halve the learning rate after each step."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    @staticmethod
    def train(model, steps: range, optimizers, schedulers):
        for step in steps:
            states = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            for layer in model["decoder"]["layers"]:
                states = layer(states).tanh()
            model["head"](states).square().sum().backward()
            for optimizer in (*optimizers, *schedulers):
                optimizer.step()
            model.zero_grad()

    def test_equals_two_optimizers(self):
        models = self.build(), self.build()
        ours = MuonAdamW(models[0], lr=0.1, weight_decay=0.05, betas=(0.9, 0.98))
        layers = models[1]["decoder"]["layers"]
        muon = torch.optim.Muon(
            [layer.weight for layer in layers], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        )
        biases = [layer.bias for layer in layers] + [models[1]["head"].bias]
        groups = [{"params": [models[1]["head"].weight]}, {"params": biases, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.05, betas=(0.9, 0.98))

        for model, optimizers in zip(models, ([ours], [muon, adamw])):
            schedulers = [self.halve(optimizer) for optimizer in optimizers]
            self.train(model, range(4), optimizers, schedulers)
        for ours, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_resumes(self):
        """Saved after two steps, another one goes on to the same weights, and its schedule reaches both optimizers."""

        def build() -> tuple:
            model = self.build()
            optimizer = MuonAdamW(model, lr=0.1, weight_decay=0.05, betas=(0.9, 0.98))
            return model, optimizer, self.halve(optimizer)

        model, optimizer, scheduler = build()
        self.train(model, range(2), [optimizer], [scheduler])
        saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)])
        self.train(model, range(2, 4), [optimizer], [scheduler])
        again, *others = build()
        for part, state in zip((again, *others), saved, strict=True):
            part.load_state_dict(state)
        self.train(again, range(2, 4), others[:1], others[1:])
        for ours, expected in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, expected)

    def test_frozen_parameters_stay(self):
        model = self.build()
        model["head"].requires_grad_(False)
        optimizer = MuonAdamW(model, lr=0.1, weight_decay=0.05, betas=(0.9, 0.98))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 4

    def test_closure(self):
        """It is called once, and its gradients reach both optimizers."""
        models, losses = (self.build(), self.build()), []
        for model, is_closure in zip(models, (True, False)):
            optimizer = MuonAdamW(model, lr=0.1, weight_decay=0.05, betas=(0.9, 0.98))

            def compute(model=model) -> torch.Tensor:
                loss = sum(parameter.square().sum() for parameter in model.parameters())
                loss.backward()
                losses.append(loss.item())
                return loss

            loss = optimizer.step(compute) if is_closure else compute()
            if not is_closure:
                assert optimizer.step() is None
            assert loss.item() == losses[-1]
        assert len(losses) == 2 and losses[0] == losses[1]
        for ours, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(ours, expected)


class TestPartialImages:
    """Losses of a part of the visual tokens, against the model's own of whole images."""

    @pytest.fixture
    def requests(self):
        captions = ("a cat", "a red apple on a plate", "two dogs, please", "the sun", "an owl", "three red keys")
        texts = [{"role": "user", "content": [{"type": "text", "text": caption}]} for caption in captions]
        answer = {"role": "assistant", "content": [{"type": "image"}]}
        tokens = torch.randn(len(texts), 1, 4, 16, generator=torch.Generator().manual_seed(0))
        tokens = torch.nn.functional.normalize(tokens, dim=-1)
        messages = [[text, answer] for text in texts]
        return Dataset.from_dict({"index": range(len(texts))}).with_transform(
            lambda columns: {
                "messages": [messages[index] for index in columns["index"]],
                "visual_tokens": [list(tokens[index]) for index in columns["index"]],
            }
        )

    @pytest.fixture
    def build(self, tiny_model, tiny_processor, requests, tmp_path):
        """Return a function that makes a trainer for requests of which each step also sees three in part."""

        def build(num_tokens: int) -> PartialImageTrainer:
            options = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
            args = VPiTConfig(str(tmp_path), bf16=False, report_to="none", **options)
            more = {"requests": requests, "num_requests": 3, "num_tokens": num_tokens}
            model = tiny_model(visual_decoding="parallel", visual_loss_weight=4.0)
            return PartialImageTrainer(
                model, args, processing_class=tiny_processor, train_dataset=requests.select(range(4)), **more
            )

        return build

    def test_every_second_answer_says_first_what_it_shows(self, build, requests):
        trainer, messages = build(4), requests[:4]["messages"]
        for _, answer in messages:
            answer["content"] = [{"type": "text", "text": "red, as you said"}, {"type": "image"}]
        samples = [
            {"messages": turns, "visual_tokens": requests[i]["visual_tokens"]} for i, turns in enumerate(messages)
        ]
        loss = trainer.compute_partial_loss(**trainer.collate_requests(samples))
        for sample in samples[::2]:
            sample["messages"] = [sample["messages"][0], {"role": "assistant", "content": [{"type": "image"}]}]
        batch = trainer.data_collator(samples)
        expected = trainer.metamorph(**{name: batch[name] for name in batch if name != "sample_ids"}).visual_loss
        torch.testing.assert_close(loss, expected)

    def test_of_all_tokens_is_the_loss_of_the_model(self, build, requests):
        trainer, samples = build(4), [requests[index] for index in range(5)]
        loss = trainer.compute_partial_loss(**trainer.collate_requests(samples))
        batch = trainer.data_collator(samples)
        expected = trainer.metamorph(**{name: batch[name] for name in batch if name != "sample_ids"}).visual_loss
        torch.testing.assert_close(loss, expected)

    def test_of_two_tokens_is_that_of_whole_images_with_hidden_queries(self, build, requests):
        trainer, losses = build(2), []
        collated = trainer.collate_requests([requests[index] for index in range(5)])
        torch.manual_seed(3)
        loss = trainer.compute_partial_loss(**collated)
        torch.manual_seed(3)
        chosen = torch.rand(5, 3).argmax(1).tolist()
        for query, sample in zip(chosen, (requests[index] for index in range(5))):
            batch = trainer.data_collator([sample])
            first = int((batch["input_ids"][0] == trainer.processing_class.image_token_id).nonzero()[0])
            batch["attention_mask"][0, first : first + 4] = 0
            batch["attention_mask"][0, first + query] = 1
            found = trainer.metamorph(**{name: batch[name] for name in batch if name != "sample_ids"}).visual_losses
            losses += [found[0], found[query + 1]]
        torch.testing.assert_close(loss, torch.stack(losses).mean())

    def test_a_step_adds_its_gradient(self, build, requests):
        trainer, other = build(4), build(4)
        batch = trainer.data_collator([requests[0], requests[1]])
        model = trainer.model.train()
        trainer.training_step(model, copy.deepcopy(batch))
        whole = other.metamorph.train()(**{name: batch[name] for name in batch if name != "sample_ids"})
        partial = other.compute_partial_loss(**other.collate_requests([requests[index] for index in range(3)]))
        (whole.loss + 4 * partial).backward()
        for ours, expected in zip(model.parameters(), other.model.parameters(), strict=True):
            if expected.grad is None:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, expected.grad)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_each_step_has_requests_of_its_own(self, build, requests, monkeypatch, workers):
        trainer, seen = build(2), []
        trainer.args.dataloader_num_workers = workers
        compute = trainer.compute_partial_loss

        def record(**batch):
            seen.append(batch["visual_tokens"])
            return compute(**batch)

        monkeypatch.setattr(trainer, "compute_partial_loss", record)
        trainer.train()
        expected = torch.cat([torch.stack(tokens) for tokens in requests[:6]["visual_tokens"]])
        torch.testing.assert_close(torch.cat(seen), expected)

    def test_continues_with_the_requests_of_the_next_step(self, build, requests):
        trainer = build(2)
        trainer.state.global_step = 1
        expected = torch.stack([tokens[0] for tokens in requests[3:6]["visual_tokens"]])
        torch.testing.assert_close(next(trainer.request_batches)["visual_tokens"], expected)
