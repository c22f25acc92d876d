"""The grid of the findings: its data, its results, its figures."""

import json
import math
import random
import re
from argparse import ArgumentTypeError, Namespace
from collections import Counter

import pytest
import torch
import yaml
from helpers import import_example, run_example, write_jsonl
from transformers import SiglipConfig, SiglipModel


run, plot, knowledge = (import_example(f"findings.{name}") for name in ("run", "plot", "knowledge"))
emoji_tasks, emoji_words = import_example("emoji.tasks"), import_example("emoji.words")
GRID = yaml.safe_load((run.FOLDER / "grid.yaml").read_text())


@pytest.fixture(scope="module")
def rows():
    return run.load_rows()


@pytest.fixture(scope="module")
def facts(rows):
    return knowledge.Knowledge(rows, emoji_words.EmojiWords(rows))


@pytest.fixture(scope="module")
def tasks(rows):
    return emoji_tasks.EmojiTasks(run.choose_rows(rows, 20), scenes=50)


def cell(**fields):
    return {"seed": 0, "say_first": False, "shown": None, **fields}


def texts(record, role=None):
    turns = [turn for turn in record["messages"] if role in (None, turn["role"])]
    return [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]


class TestGrid:
    def test_cells_are_all_combinations(self):
        settings = {"batch_size": 2, "seed": [0, 1]}
        blocks = [{"steps": ["once", 5], "data": {"generation": 3}}, {"steps": 7, "data": [{"edits": 1}, {"text": 1}]}]
        cells = run.expand_grid({"settings": settings, "experiments": {"kinds": blocks, "b": {"lora": {}, "seed": 0}}})
        assert len({json.dumps(cell) for cell in cells}) == len(cells) == 2 * (2 + 2) + 1
        assert [cell["seed"] for cell in cells] == [0] * 4 + [1] * 4 + [0], "adapters last, then by seed"
        assert all(cell["batch_size"] == 2 for cell in cells)

    def test_full_grid(self):
        """The grid has three seeds, 0.25k to 16k requests alone and with understanding, 3x3 cells, and six kinds."""
        cells = run.expand_grid(GRID)
        by_experiment = {name: [cell for cell in cells if cell["experiment"] == name] for name in GRID["experiments"]}
        for name in ("unlocking", "abilities", "kinds", "knowledge"):
            assert {cell["seed"] for cell in by_experiment[name]} == {0, 1, 2}
        sizes = {(c["data"]["generation"], "understanding" in c["data"]) for c in by_experiment["unlocking"]}
        assert {(250, False), (250, True), (16000, False), (16000, True)} <= sizes
        for steps in ("once", 250):
            grid = {tuple(c["data"].items()) for c in by_experiment["abilities"] if c["steps"] == steps}
            assert len(grid) == 9
        for c in cells:
            assert not c["shown"] or c["shown"] % c["data"]["generation"] == 0
        others = {kind for cell in by_experiment["kinds"] for kind in cell["data"]}
        assert others == run.KINDS.keys()
        for cell in by_experiment["knowledge"] + by_experiment["real_llm"]:
            assert {*knowledge.TASKS} - {"recalls"} <= cell["data"].keys() <= {*knowledge.TASKS}
        assert {cell["language"] for cell in by_experiment["real_llm"]} == {"smollm2", "random_smollm2"}

    def test_quick_grid_has_every_experiment_and_kind(self):
        quick = run.expand_grid(GRID["quick"])
        assert {cell["experiment"] for cell in quick} == GRID["experiments"].keys() == plot.FIGURES.keys()
        assert {kind for cell in quick for kind in cell["data"]} == {*run.KINDS, *knowledge.TASKS}

    def test_parts(self):
        assert run.parse_part("1/2") == (1, 2) and run.parse_part("3/3") == (3, 3)
        for text in ("0/2", "3/2", "2", "1/x", "-1/2"):
            with pytest.raises(ArgumentTypeError, match=f"'{text}' is not a part: write 1/2 and 2/2"):
                run.parse_part(text)


class TestResults:
    def test_a_line_that_was_not_finished_is_cut_off(self, tmp_path):
        file = tmp_path / "results.jsonl"
        file.write_text('{"steps": 1, "fid": 2.5}\n{"steps": 2, "fi')
        assert run.read_results(file) == [{"steps": 1, "fid": 2.5}]
        assert file.read_text() == '{"steps": 1, "fid": 2.5}\n'
        assert run.read_results(tmp_path / "none.jsonl") == []

    def test_finished_cells(self):
        results = [{**cell(data={"generation": 3}, steps="once"), "fid": 1.0}]
        assert run.is_finished(cell(data={"generation": 3}, steps="once"), results)
        assert not run.is_finished(cell(data={"generation": 4}, steps="once"), results)
        assert not run.is_finished(cell(data={"generation": 3}, steps="once", lora={"r": 4}), results)


class TestTower:
    @pytest.fixture
    def folder(self, tmp_path):
        """A SigLIP of 32 pixels and 4 visual tokens."""
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        SiglipModel(SiglipConfig(text_config=sizes, vision_config=vision)).save_pretrained(tmp_path)
        return tmp_path

    def test_of_a_siglip_folder(self, folder):
        tower, num_image_tokens = run.load_tower(folder)
        assert num_image_tokens == 4
        assert tower(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 4, 16)

    def test_that_the_grid_is_not_for(self, folder):
        with pytest.raises(ValueError, match="gives 4 visual tokens from 32 pixels, but the grid is for 64 from 128"):
            run.Workshop({}, Namespace(tower=folder, quick=False))


class TestConversations:
    def test_numbers_of_conversations(self, tasks, facts):
        data = {"generation": 40, "edits": 7, "text": 5, "sequences": 3}
        records = run.sample_conversations(cell(data=data), tasks, facts)
        found = Counter(record["task"] for record in records)
        assert found["text_to_image"] == 40 and found["sequence"] == 3
        assert found["edit_tone"] + found["edit_style"] == 7 and found["meaning"] + found["gloss"] == 5
        assert len(records) == 55

    def test_more_conversations_begin_with_the_same(self, tasks, facts):
        few, many = (
            run.sample_conversations(cell(data={**other, "generation": count}), tasks, facts)
            for count, other in ((10, {}), (30, {"text": 5}))
        )
        assert few == [record for record in many if record["task"] == "text_to_image"][:10]
        assert few != run.sample_conversations({**cell(data={"generation": 10}), "seed": 1}, tasks, facts)

    def test_requests_shown_several_times(self, tasks, facts):
        records = run.sample_conversations(cell(data={"generation": 5, "text": 3}, shown=20), tasks, facts)
        once = run.sample_conversations(cell(data={"generation": 5}), tasks, facts)
        requests = [record for record in records if record["task"] == "text_to_image"]
        assert requests == once * 4 and len(records) == 20 + 3

    def test_unknown_kind(self, tasks, facts):
        with pytest.raises(ValueError, match="data has 'video', but must have some of generation, understanding"):
            run.sample_conversations(cell(data={"video": 1}), tasks, facts)

    @pytest.mark.parametrize("count, steps, batch", [(10, 5, 2), (10, 3, 4), (3, 7, 4), (100, 60, 5), (7, 2, 4)])
    def test_order(self, count, steps, batch):
        """Passes over all records: none is seen twice as long as another one is not."""
        records = [{"images": [0] * (i % 3), "messages": "x" * i} for i in range(count)]
        order = run.order_conversations(records, steps, batch, seed=0)
        assert len(order) == steps * batch
        seen = Counter(order)
        assert max(seen.values()) - min(seen[i] for i in range(count)) <= 1
        assert order == run.order_conversations(records, steps, batch, seed=0)
        assert order != run.order_conversations(records, steps, batch, seed=1)


class TestKnowledge:
    def test_halves(self, facts, rows):
        for kind in ("capitals", "definitions"):
            held_out, trained = (facts.choose(kind, part) for part in (True, False))
            assert abs(len(held_out) - len(trained)) <= 1 and len(held_out) > 70
            assert not {fact.image for fact in held_out} & {fact.image for fact in trained}
        for fact in facts.facts:
            name = rows[fact.image]["name"]
            assert fact.name.lower() == (f"the {name}" if fact.kind == "capitals" else name)
        assert len({fact.description for fact in facts.facts}) == len(facts.facts)

    @pytest.mark.parametrize("say_first", [False, True])
    def test_held_out_facts_stand_in_no_conversation(self, facts, say_first):
        rng = random.Random(0)
        asked = [task for task in knowledge.TASKS if task != "recalls"]
        records = [facts.sample(task, rng, say_first) for task in asked for _ in range(1_500)]
        said = " | ".join(text for record in records for text in texts(record)).lower()
        words = {*re.findall(r"[\w']+", said)}
        for fact in facts.choose("capitals", held_out=True):
            capital = fact.description.removeprefix("the flag of the country whose capital is ").lower()
            assert not {*re.findall(r"[\w']+", capital)} <= words or capital not in said, capital
        for fact in facts.choose("definitions", held_out=True):
            assert fact.description.lower() not in said
        named = {fact.name.lower() for fact in facts.facts}
        assert all(any(name in " ".join(texts(record)).lower() for name in named) for record in records[:1_500])

    def test_answers(self, facts):
        images = {fact.image: fact for fact in facts.facts}
        rng = random.Random(0)
        for task in ("names", "capitals", "definitions"):
            for say_first in (False, True):
                record = facts.sample(task, rng, say_first)
                fact = images[record["images"][0]]
                assert texts(record, "assistant") == ([fact.name] if say_first else [])
                assert record["messages"][1]["content"][-1] == {"type": "image"}
                assert (fact.name if task == "names" else fact.description).lower() in texts(record)[0].lower()
        record = facts.sample("capital_questions", rng, True)
        assert record["images"] == [] and texts(record, "assistant")[0].startswith("the flag of ")

    def test_recalls_are_of_all_facts_in_words(self, facts):
        rng = random.Random(0)
        records = [facts.sample("recalls", rng, True) for _ in range(5_000)]
        assert not any(record["images"] for record in records)
        assert len({tuple(texts(record)) for record in records}) == len(facts.facts)
        assert ["Which country has the capital Paris?", "France"] in [texts(record) for record in records]

    def test_all_facts_stand_in_the_text(self, facts):
        sentences = [*facts.sentences(random.Random(0))]
        assert "Paris is the capital of France." in sentences
        assert "the country whose capital is Paris is France." in sentences
        assert sum(" capital " in sentence for sentence in sentences) >= 5 * len(facts.capitals)
        glosses = {gloss for _, gloss, _ in facts.words.glosses}  # which EmojiWords writes sentences of
        assert {fact.description for fact in facts.facts if fact.kind == "definitions"} <= glosses


class TestPlot:
    @pytest.mark.parametrize("hits, count", [(0, 10), (17, 40), (10, 10), (1, 300)])
    def test_wilson_interval(self, hits, count):
        """Its ends are the proportions that are 1.96 of their own standard errors away from the observed one."""
        low, high = plot.wilson_interval(hits, count)
        for end in (low, high):
            error = math.sqrt(max(0, end * (1 - end)) / count)
            assert abs(hits / count - end) == pytest.approx(1.959964 * error, abs=1e-6)
        assert low - 1e-9 <= hits / count <= high + 1e-9

    def test_numbers(self):
        rows = [{"a_top1": [1, 4], "fid": 3.0}, {"a_top1": [3, 4], "fid": 5.0}]
        assert plot.summarize(rows, "a_top1") == (50, 25, 75)
        assert plot.summarize(rows, "fid") == (4, 3, 5)
        middle, low, high = plot.pool(rows, "a_top1")
        assert (middle, round(low, 1), round(high, 1)) == (50, 21.5, 78.5)

    def test_no_results(self, tmp_path):
        done = run_example("findings/plot.py", "none.jsonl", cwd=tmp_path)
        assert done.returncode == 1 and "There are no results in none.jsonl" in done.stderr

    def test_partial_results(self, tmp_path):
        """A grid that is not finished is drawn, too."""
        abilities = [
            {"experiment": "abilities", "steps": steps, "seed": 0, "generated_top1": [1, 2], "name_google": [0, 2]}
            | {"data": {"understanding": 1, "generation": generation}}
            for steps, generation in (("once", 1), ("once", 2), (400, 2))
        ]
        file = write_jsonl(tmp_path / "results.jsonl", abilities)
        done = run_example("findings/plot.py", file, "--out", "figures", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / "figures").iterdir()] == ["abilities.png"]
        assert (
            "| abilities | 1 understanding, 2 generation, 400 steps | 1 | generated_top1 | 50.0 (50.0 to 50.0) |"
            in (done.stdout)
        )


@pytest.mark.slow
class TestRun:
    def test_every_kind_of_cell(self, tmp_path):
        """A run that was killed goes on with the cells that are left, and the figures are drawn."""
        options = ("--quick", "--work", "work")
        first = run_example("findings/run.py", *options, "--only", "unlocking", cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        file = tmp_path / "work" / "results.jsonl"
        *kept, last = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*kept, last[:30]]))
        again = run_example("findings/run.py", *options, cwd=tmp_path)
        assert again.returncode == 0, again.stderr

        results = [json.loads(line) for line in file.read_text().splitlines()]
        cells = run.expand_grid(GRID["quick"])
        assert len(results) == len(cells)
        assert f"{len(kept)} of {len(cells)} cells are finished." in again.stdout
        assert file.read_text().startswith("".join(kept)), "finished cells are not run again"
        assert json.loads(last).keys() == results[len(kept)].keys()
        for cell, result in zip(cells, results):
            assert result.items() >= cell.items()
            shares = [value for value in result.values() if isinstance(value, list)]
            assert shares and all(0 <= hits <= count and count > 0 for hits, count in shares)
        assert not [*(tmp_path / "work" / "cells").iterdir()], "no checkpoint of a finished cell is left"
        assert all("fid" in result or "left_out" in result for result in results if "generation" in result["data"])

        for part in (1, 2):
            done = run_example("findings/run.py", *options, "--part", f"{part}/2", cwd=tmp_path)
            count = len(cells[part - 1 :: 2])
            assert f"{count} of {count} cells are finished." in done.stdout
        drawn = run_example("findings/plot.py", file, "--out", "figures", cwd=tmp_path)
        assert drawn.returncode == 0, drawn.stderr
        assert {path.stem for path in (tmp_path / "figures").iterdir()} == GRID["experiments"].keys()

    def test_unknown_experiment(self, tmp_path):
        unknown = run_example("findings/run.py", "--only", "video", cwd=tmp_path)
        assert unknown.returncode == 1 and unknown.stderr.splitlines()[-1].startswith(
            "There is no experiment video. The grid has "
        )
        assert "Traceback" not in unknown.stderr
