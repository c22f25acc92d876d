"""The example scripts, run as a user runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from metamorph_hf import MetaMorphPipeline


EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "emoji" / "checkpoint"


def run(script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


class TestGenerate:
    def test_text_to_image(self, tmp_path):
        done = run("generate.py", "a red apple", "--out", "apple.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "saved apple.png (64x64)" in done.stdout
        image = Image.open(tmp_path / "apple.png").convert("RGB")
        pixels = list(image.resize((8, 8)).crop((2, 2, 6, 6)).getdata())
        reddish = sum(red > 1.5 * green and red > 1.5 * blue for red, green, blue in pixels)
        assert reddish >= len(pixels) / 2, "the middle of a red apple is not red"

    def test_question_about_an_image(self, tmp_path, picture):
        done = run("generate.py", "What is this?", "--image", picture, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()

    def test_unreadable_image(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        done = run("generate.py", "What is this?", "--image", "broken.png", cwd=tmp_path)
        assert done.returncode == 1
        assert "broken.png is not an image that can be read" in done.stderr

    def test_missing_image(self, tmp_path):
        done = run("generate.py", "What is this?", "--image", "nowhere.png", cwd=tmp_path)
        assert done.returncode == 1
        assert "nowhere.png cannot be read" in done.stderr

    def test_folder_without_a_pipeline(self, tmp_path):
        done = run("generate.py", "a cat", "--model", tmp_path, cwd=tmp_path)
        assert done.returncode == 1
        assert "it has no model_index.json" in done.stderr

    def test_half_written_pipeline(self, tmp_path):
        shutil.copytree(CHECKPOINT, tmp_path / "half")
        weights = tmp_path / "half" / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        done = run("generate.py", "a cat", "--model", "half", cwd=tmp_path)
        assert done.returncode == 1
        assert "half could not be loaded; it is missing or only half written" in done.stderr

    def test_prompt_longer_than_the_context(self, tmp_path):
        done = run("generate.py", "a cat and " * 400, cwd=tmp_path)
        assert done.returncode == 1
        assert "longer than the model's context of 512 tokens" in done.stderr


def test_benchmark(tmp_path):
    sizes = ("--hidden", 64, "--layers", 1, "--vocabulary", 200, "--visual-tokens", 4, "--repeats", 1)
    small = ("--tower-hidden", 64, "--tower-layers", 1, "--prompts", 16, "--images", 1)
    done = run("benchmark.py", *sizes, *small, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert json.loads(done.stdout.splitlines()[-1])["results"] == results
    assert len(results) == 11 and all(value > 0 for value in results.values())


@pytest.mark.slow
class TestEmojiRecipe:
    def test_quick_passes_all_steps_and_resumes(self, tmp_path):
        arguments = ("--quick", "--work", tmp_path / "work", "--out", tmp_path / "out")
        done = run("emoji/train.py", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pipe = MetaMorphPipeline.from_pretrained(tmp_path / "out")
        assert len(pipe.decode_visual_tokens(torch.randn(2, 16, 32), num_inference_steps=2)) == 2
        again = run("emoji/train.py", *arguments, cwd=tmp_path)  # everything is done: nothing is trained again
        assert again.returncode == 0, again.stderr
        assert "U-Net" not in again.stderr and "SigLIP" not in again.stderr

    def test_evaluate(self, tmp_path):
        done = run("emoji/evaluate.py", "--limit", "32", "--sheet", tmp_path / "sheet.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers = json.loads(done.stdout)
        assert numbers["category_twitter_held_out"] > 40  # chance is about 15 %
        assert numbers["unseen_phrasings_top1"] > 70 and numbers["painted_and_encoded_again_top1"] > 60
        assert numbers["seen_phrasings_top5"] >= numbers["seen_phrasings_top1"]
        assert numbers["generate_seconds"] > 0
        assert (tmp_path / "sheet.png").is_file()
