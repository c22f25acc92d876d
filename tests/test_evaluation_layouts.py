"""Folders for GenEval, DPG-Bench and WISE, read as their published scorers read them."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, import_example, run_example_in_two_processes, write_jsonl
from PIL import Image

from metamorph_hf import MetaMorphGenerationConfig, MetaMorphPipeline


evaluate_generation = import_example("evaluate_generation.py")
SAMPLES = ["dog", "red apple", "bus"]


def geneval_entry(name: str) -> dict:
    return {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}


def wise_entry(name: str, number: int) -> dict:
    entry = {"Prompt": name, "Explanation": f"It shows a {name}.", "Category": "Time", "Subcategory": "Day"}
    return {**entry, "prompt_id": number}


@pytest.fixture
def prompts(tmp_path):
    """Return a function that writes a benchmark's own prompts of three names, and returns the path."""

    def write(layout: str) -> str:
        if layout == "geneval":
            return write_jsonl(tmp_path / "evaluation_metadata.jsonl", [geneval_entry(name) for name in SAMPLES])
        if layout == "wise":
            path = tmp_path / "science.json"
            path.write_text(json.dumps([wise_entry(name, 641 + index) for index, name in enumerate(SAMPLES)]))
            return str(path)
        (tmp_path / "prompts").mkdir()
        for name in SAMPLES:
            (tmp_path / "prompts" / f"{name.replace(' ', '_')}.txt").write_text(f"{name}\n")
        return str(tmp_path / "prompts")

    return write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script in this process, with two denoising steps, and return `result.json`."""

    def main(layout: str, captions: str, *flags) -> dict:
        command = ["evaluate_generation.py", "--output", "out", "--steps", "2", "--layout", layout, "--cpu"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*command, "--captions", captions, *map(str, flags)])
        evaluate_generation.main()
        return json.loads((tmp_path / "out" / "result.json").read_text())

    return main


def read_geneval(folder: Path) -> list[tuple[dict, dict[str, np.ndarray]]]:
    """As evaluate_images.py: folders of digits with metadata.jsonl, and in `samples` files of digits."""
    found = []
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        with open(folder / name / "metadata.jsonl") as file:
            metadata = json.load(file)
        names = [n for n in os.listdir(folder / name / "samples") if re.match(r"\d+\.png", n)]
        found.append((metadata, {n: np.asarray(Image.open(folder / name / "samples" / n)) for n in names}))
    return found


def read_dpg(folder: Path, questions: set[str], resolution: int) -> dict[str, list[np.ndarray]]:
    """As compute_dpg_bench.py: every file of the folder, its id before the first dot, four squares of `resolution`."""
    found = {}
    for name in os.listdir(folder):
        image, key = Image.open(folder / name), name.split(".")[0]
        assert key in questions
        boxes = [(x, y, x + resolution, y + resolution) for y in (0, resolution) for x in (0, resolution)]
        found[key] = [np.asarray(image.crop(box)) for box in boxes]
        assert image.size == (2 * resolution, 2 * resolution)
    return found


def sample(out: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(out / "samples" / f"{name}.png"))


class TestGenEval:
    def test_folder(self, run, prompts, tmp_path, capsys):
        result = run("geneval", prompts("geneval"))
        found = read_geneval(tmp_path / "out" / "images")
        assert [metadata for metadata, _ in found] == [geneval_entry(name) for name in SAMPLES]
        for index, (_, images) in enumerate(found):
            assert sorted(images) == ["0000.png", "0001.png", "0002.png", "0003.png"]
            for number, name in enumerate(sorted(images)):
                assert (images[name] == sample(tmp_path / "out", f"{index:05}_{number}")).all()
            assert len({image.tobytes() for image in images.values()}) == 4  # each has its own noise
            grid = np.asarray(Image.open(tmp_path / "out" / "images" / f"{index:05}" / "grid.png"))
            assert (grid[128:, :128] == images["0002.png"]).all() and grid.shape == (256, 256, 3)
        assert (result["prompt_form"], result["generated_in_this_run"]) == ("short", 12)
        assert result["settings"]["layout"] == "geneval" and result["without_image"] == result["notes"] == []
        assert f"evaluate_images.py {tmp_path}/out/images --outfile" in capsys.readouterr().out

    def test_long_prompts_are_recorded(self, run, tmp_path):
        entry = {**geneval_entry("dog"), "prompt": "A realistic dog stands on a grassy field."}
        assert run("geneval", write_jsonl(tmp_path / "long.jsonl", [entry]))["prompt_form"] == "long"

    def test_a_killed_run_goes_on(self, run, prompts, tmp_path):
        """Two images are missing and one is half-written; one answer had no image."""
        out, captions = tmp_path / "out", prompts("geneval")
        run("geneval", captions)
        before = sample(out, "00001_3")
        for name in ("00000_1", "00001_3", "00002_0"):
            (out / "samples" / f"{name}.png").unlink()
        (out / "samples" / "00000_1.part").write_bytes(b"\x89PNG half")
        (out / "samples" / "00002_0.txt").write_text("I do not draw.")
        (out / "images" / "00000" / "samples" / "0001.png").write_bytes(b"\x89PNG half")
        result = run("geneval", captions)
        assert result["generated_in_this_run"] == 2
        found = read_geneval(out / "images")
        assert np.abs(found[1][1]["0003.png"].astype(int) - before).max() <= 1
        assert found[0][1]["0001.png"].any() and not found[2][1]["0000.png"].any()
        (missing,) = result["without_image"]
        assert missing == {"id": "00002_0", "caption": "a photo of a bus", "answer": "I do not draw."}
        assert result["notes"] == [
            "1 of the answers have no image: these images are black, so that they count as wrong."
        ]

    def test_no_image_at_all(self, run, prompts, tmp_path):
        captions = prompts("geneval")
        run("geneval", captions)
        for path in (tmp_path / "out" / "samples").glob("*.png"):
            path.rename(path.with_suffix(".txt"))
        with pytest.raises(SystemExit, match="None of the answers to the 3 prompts has an image"):
            run("geneval", captions)

    def test_broken_image(self, run, prompts, tmp_path):
        captions = prompts("geneval")
        run("geneval", captions)
        (tmp_path / "out" / "samples" / "00001_1.png").write_bytes(b"\x89PNG half")
        with pytest.raises(SystemExit, match="The image cannot be read .*00001_1.png"):
            run("geneval", captions)


class TestDpg:
    def test_folder(self, run, prompts, tmp_path):
        result = run("dpg", prompts("dpg"), "--batch-size", 5)
        (command,) = result["commands"]
        resolution = int(re.search(r"--resolution (\d+)", command)[1])
        found = read_dpg(tmp_path / "out" / "images", {"dog", "red_apple", "bus"}, resolution)
        assert found.keys() == {"dog", "red_apple", "bus"}
        for name, images in found.items():
            assert all((image == sample(tmp_path / "out", f"{name}_{i}")).all() for i, image in enumerate(images))
            assert len({image.tobytes() for image in images}) == 4

    def test_strange_files(self, run, prompts, tmp_path):
        captions = prompts("dpg")
        (tmp_path / "prompts" / "a.b.txt").write_text("a cat")
        with pytest.raises(SystemExit, match="a.b.txt is not a prompt of DPG-Bench"):
            run("dpg", captions)


class TestWise:
    def test_folder(self, run, prompts, tmp_path):
        captions = prompts("wise")
        result = run("wise", captions)
        out = tmp_path / "out"
        assert sorted(os.listdir(out / "images")) == ["641.png", "642.png", "643.png"]
        assert (np.asarray(Image.open(out / "images" / "642.png")) == sample(out, "642_0")).all()
        assert result["notes"] == ["The prompts lack 997 of WISE's ids 1 to 1000, the first is 1."]
        assert result["commands"] == [f"IMAGE_DIR={out}/images bash eval_qwen.sh"]

    def test_missing_answers_are_named(self, run, prompts, tmp_path):
        captions, out = prompts("wise"), tmp_path / "out"
        run("wise", captions)
        (out / "samples" / "642_0.png").rename(out / "samples" / "642_0.txt")
        (out / "samples" / "642_0.txt").write_text("no")
        (out / "images" / "642.png").unlink()
        result = run("wise", captions)
        assert [entry["id"] for entry in result["without_image"]] == ["642_0"]
        assert sorted(os.listdir(out / "images")) == ["641.png", "643.png"]
        assert result["notes"][0] == "1 of the answers have no image: these images are missing."

    def test_three_files(self, run, tmp_path):
        paths = [tmp_path / f"{number}.json" for number in range(2)]
        for number, path in enumerate(paths):
            path.write_text(json.dumps([wise_entry("dog", 1 + number)]))
        run("wise", ",".join(map(str, paths)))
        assert sorted(os.listdir(tmp_path / "out" / "images")) == ["1.png", "2.png"]
        with pytest.raises(SystemExit, match="The prompts have the id 1 2 times: ids must be unique"):
            run("wise", f"{paths[0]},{paths[0]}")


class TestTwoProcesses:
    """A tiny pipeline that begins each answer with an image; the samples of one prompt are from both processes."""

    @pytest.mark.slow
    def test_folder_is_whole(self, run, prompts, components, tmp_path):
        components["model"].generation_config = MetaMorphGenerationConfig(force_image=True, max_images=1)
        MetaMorphPipeline(**components).save_pretrained(tmp_path / "pipeline")
        captions, flags = prompts("dpg"), ["--pipeline", "pipeline", "--max-new-tokens", 8, "--batch-size", 4]
        whole = run("dpg", captions, *flags)
        flags += ["--output", "two", "--steps", 2, "--layout", "dpg", "--captions", captions, "--cpu"]
        done = run_example_in_two_processes("evaluate_generation.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((tmp_path / "two" / "result.json").read_text())
        for facts in (whole, result):
            assert facts["generated_in_this_run"] == 12 and facts["without_image"] == facts["notes"] == []
        assert result["settings"] == whole["settings"]
        one, two = (read_dpg(tmp_path / name / "images", {"dog", "red_apple", "bus"}, 8) for name in ("out", "two"))
        assert one.keys() == two.keys() == {"dog", "red_apple", "bus"}
        for name, images in one.items():
            assert len({image.tobytes() for image in images}) == 4
            assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(images, two[name], strict=True))


class TestBadInput:
    @pytest.mark.parametrize(
        ("layout", "content", "sentence"),
        [
            ("geneval", '{"tag": "a"}', "line 1, has tag, but the benchmark's own file has include, prompt, tag or"),
            ("geneval", json.dumps({**geneval_entry("a"), "seed": 1}), "line 1, has include, prompt, seed, tag, but"),
            ("geneval", json.dumps(geneval_entry("a")) + "\n[3]", "line 2, has list, but"),
            ("geneval", json.dumps(geneval_entry("a")) + "\n\n", "line 2, cannot be read: Expecting value"),
            ("geneval", json.dumps({**geneval_entry("a"), "prompt": " "}), "The prompt 00000 is empty"),
            ("geneval", "", "holds no prompts"),
            ("wise", json.dumps([{"Prompt": "a"}]), "entry 0, has Prompt, but the benchmark's own file has Category"),
            ("wise", json.dumps([wise_entry("a", 1001)]), "entry 0: prompt_id is 1001, but must be 1 to 1000"),
            ("wise", json.dumps([wise_entry("a", 2), wise_entry("b", 2)]), "The prompts have the id 2 2 times"),
            ("wise", "[", "cannot be read: Expecting value"),
        ],
    )
    def test_prompts(self, run, tmp_path, layout, content, sentence):
        (tmp_path / "prompts.json").write_text(content)
        with pytest.raises(SystemExit, match=sentence):
            run(layout, "prompts.json")

    @pytest.mark.parametrize("layout", ["geneval", "dpg", "wise"])
    def test_no_prompts(self, run, layout):
        with pytest.raises(SystemExit, match=f"nowhere does not exist: --layout {layout} needs"):
            run(layout, "nowhere")

    def test_documented_commands(self, monkeypatch):
        commands = re.findall(r"`GENERATE (.*?)`", (ROOT / "docs" / "evaluation.md").read_text())
        for command in commands:
            monkeypatch.setattr(sys, "argv", ["evaluate_generation.py", "--pipeline", "my-pipeline", *command.split()])
            evaluate_generation.parse_args()
        assert {re.search(r"--layout (\w+)", command)[1] for command in commands[1:]} == {"geneval", "dpg", "wise"}

    def test_prompts_must_be_given(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["evaluate_generation.py", "--output", "out", "--layout", "dpg"])
        with pytest.raises(SystemExit, match="2"):
            evaluate_generation.main()
        assert "--layout needs the benchmark's prompts by --captions" in capsys.readouterr().err
