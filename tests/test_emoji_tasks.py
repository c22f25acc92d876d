"""The emoji conversations and what training never sees of them."""

import random
from itertools import chain

import pytest
import torch
from datasets import Dataset
from helpers import EXAMPLES_FOLDER, import_example


train = import_example("emoji/train.py")
emoji_tasks = import_example("emoji/emoji_tasks.py")
CYCLES, TONES = emoji_tasks.CYCLES, emoji_tasks.TONES
HELD_OUT_PHRASINGS, MIXTURE = emoji_tasks.HELD_OUT_PHRASINGS, emoji_tasks.MIXTURE
UNDERSTANDING = emoji_tasks.UNDERSTANDING
ASKING_ABOUT_AN_IMAGE = ("name", "category", "yes_no", "thinking")


@pytest.fixture(scope="module")
def rows():
    dataset = Dataset.from_parquet(str(EXAMPLES_FOLDER / "emoji" / "emoji.parquet"))
    return dataset.remove_columns("image").to_list()


@pytest.fixture(scope="module")
def tasks(rows):
    return emoji_tasks.EmojiTasks(rows)


@pytest.fixture(scope="module")
def samples(tasks):
    rng = random.Random(5)
    return {task: [tasks.sample(task, rng) for _ in range(5_000)] for task in MIXTURE}


def texts(record):
    return [part["text"] for turn in record["messages"] for part in turn["content"] if part["type"] == "text"]


class TestSamples:
    def test_every_image_part_has_an_image(self, samples, rows):
        for record in chain.from_iterable(samples.values()):
            parts = [part for turn in record["messages"] for part in turn["content"]]
            assert len(record["images"]) == sum(part["type"] == "image" for part in parts)
            assert all(0 <= image < 2 * len(rows) for image in record["images"])

    def test_texts_are_complete(self, samples):
        for text in chain.from_iterable(texts(record) for record in chain.from_iterable(samples.values())):
            assert text
            assert not set("{}<>") & set(text), text

    def test_answers(self, samples, rows):
        for record in samples["name"]:
            assert texts(record)[1] == rows[record["images"][0]]["name"]
        for record in samples["thinking"]:
            image, crop = record["images"]
            assert crop == len(rows) + image
            assert texts(record)[1] == rows[image]["name"]
        for record in samples["text_to_image"]:
            assert rows[record["images"][0]]["vendor"] == "google"
        for record in samples["edit"]:
            source, target = (rows[image] for image in record["images"])
            assert (source["vendor"], source["base"]) == (target["vendor"], target["base"])
            assert source["skin_tone"] != target["skin_tone"]
            request = texts(record)[0].replace("?", "").replace(",", "")
            named = max((tone for tone in TONES if tone in request.split()), default="")
            assert named == target["skin_tone"]

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
        with pytest.raises(ValueError, match="'poem'.*text_to_image, name, category"):
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

    def test_held_out_twitter_images(self, samples, tasks, rows):
        for record in chain.from_iterable(samples[task] for task in ASKING_ABOUT_AN_IMAGE):
            row = rows[record["images"][0]]
            assert row["vendor"] == "google" or row["base"] not in tasks.held_out_images

    def test_pairs(self, samples, tasks, rows):
        for image in chain.from_iterable(record["images"] for record in chain.from_iterable(samples.values())):
            row = rows[image % len(rows)]
            assert (row["base"], row["skin_tone"]) not in tasks.held_out_pairs

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


class TestEvaluation:
    @pytest.mark.parametrize(
        ("kind", "size"),
        [
            ("seen_phrasings", 1911),
            ("unseen_phrasings", 1911),
            ("name_google", 1911),
            ("name_twitter_held_out", 200),
            ("category_twitter_held_out", 200),
            ("edit_held_out", 100),
            ("sequence_held_out", 24),
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
            assert rows[record["images"][0]]["vendor"] == "twitter"
            assert record["answer"] == rows[record["images"][0]]["name"]

    def test_unknown_kind(self, tasks):
        with pytest.raises(ValueError, match="no evaluation called 'all'"):
            tasks.evaluation("all")


def test_mixtures_add_up():
    assert sum(MIXTURE.values()) == pytest.approx(1)
    assert sum(UNDERSTANDING.values()) == pytest.approx(1)
    assert set(UNDERSTANDING) < set(MIXTURE)


def test_corpus_has_names_and_conversations(tasks, rows):
    lines = list(emoji_tasks.corpus(tasks))
    assert {row["name"] for row in rows} <= set(lines)
    assert len(lines) > emoji_tasks.CORPUS_CONVERSATIONS


class TestTrainingStream:
    """The training data that `train.py` builds from the records."""

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
            torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        near = tokens[0] + 0.1 * tokens[1]
        same = tokens[2].clone()  # identical images cannot be told apart, so there is nothing to learn
        found = train.find_look_alikes(torch.cat([tokens, near[None], same[None]]))
        assert found.tolist() == [True, False, False, False, True, False]

    def test_emphasis(self, rows):
        tasks = emoji_tasks.EmojiTasks(rows)
        tasks.emphasis = [50.0 if rank == 7 else 1.0 for rank in range(len(tasks.google))]
        rng = random.Random(0)
        targets = [tasks.sample("text_to_image", rng)["images"][-1] for _ in range(4000)]
        expected = 4000 * 0.85 * 50 / (len(tasks.google) + 49)
        assert abs(targets.count(tasks.google[7]) - expected) < 4 * expected**0.5

    def test_questions_show_views_and_answers_the_image(self, rows):
        """Each visual token tells its view and image."""
        tasks, count = emoji_tasks.EmojiTasks(rows), 2 * len(rows)
        views = torch.stack([torch.stack([torch.full((count,), v), torch.arange(count)], -1) for v in range(3)])

        def look_up(view, image, task):
            assert task in ("edit", "thinking")
            return views[view, image][None]

        arguments = (tasks, {"edit": 1, "thinking": 1}, 64, 8, "visual_tokens", look_up, 3)
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


class OneHotViews:
    """Three views of every image; each of their tokens tells which image it is."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return 3

    def __getitem__(self, key):
        return torch.nn.functional.one_hot(torch.tensor([key[1]]), self.count)


class TestShow:
    NUMBERS = range(3, 603, 3)  # views without noise

    def show_views(self, tasks, image, task):
        views = OneHotViews(len(tasks.rows))
        return [train.show(views, tasks, number, image, task)[0] for number in self.NUMBERS]

    @pytest.mark.parametrize("task", UNDERSTANDING)
    def test_half_of_googles_images_are_shifted_to_twitters_look(self, tasks, rows, task):
        image, others = tasks.google[7], set()
        for tokens in self.show_views(tasks, image, task):
            torch.testing.assert_close(tokens.norm(), torch.tensor(1.0))
            added, taken = (tokens > 0).nonzero().flatten().tolist(), (tokens < 0).nonzero().flatten().tolist()
            if added == [image]:
                continue
            (other,) = (number for number in added if number != image)
            assert rows[other]["vendor"] == "twitter" and not rows[other]["skin_tone"]
            assert rows[other]["base"] not in tasks.held_out_images
            if rows[other]["base"] != rows[image]["base"]:
                assert taken == [tasks.index["google", rows[other]["base"], ""]]
            others.add(other)
        assert 0.4 < len(others) / len(self.NUMBERS) < 0.6

    @pytest.mark.parametrize("task", sorted(MIXTURE.keys() - UNDERSTANDING.keys()))
    def test_other_tasks_show_the_image(self, tasks, task):
        assert all(
            tokens.argmax() == tasks.google[7] and tokens.max() == 1
            for tokens in self.show_views(tasks, tasks.google[7], task)
        )

    def test_twitters_images_stay(self, tasks):
        image = tasks.twitter[5]
        assert all(tokens.argmax() == image and tokens.max() == 1 for tokens in self.show_views(tasks, image, "name"))

    def test_number_0_is_the_image_as_it_is(self, tasks):
        tokens = train.show(OneHotViews(len(tasks.rows)), tasks, 0, tasks.google[7], "name")
        assert tokens[0, tasks.google[7]] == 1

    def test_views_have_noise(self, tasks):
        tokens = train.show(OneHotViews(len(tasks.rows)), tasks, 4, tasks.google[7], "edit")[0]
        assert tokens.argmax() == tasks.google[7] and (tokens != 0).sum() > 1000
        torch.testing.assert_close(tokens.norm(), torch.tensor(1.0))
