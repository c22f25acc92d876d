"""The example scripts, run as a user runs them."""

import json
import runpy
import shutil
import subprocess
import sys
import tarfile
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
        assert "The image cannot be read (broken.png): cannot identify image file" in done.stderr

    def test_missing_image(self, tmp_path):
        done = run("generate.py", "What is this?", "--image", "nowhere.png", cwd=tmp_path)
        assert done.returncode == 1
        assert "The image cannot be read (nowhere.png): [Errno 2] No such file" in done.stderr

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
    assert len(results) == 12 and all(value > 0 for value in results.values())


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


class TestInspectData:
    def test_samples_and_page(self, tmp_path):
        (tmp_path / "mixture.yaml").write_text(
            f"mixture:\n  - {{task: text_to_image, path: parquet, data_files: {EXAMPLES / 'emoji' / 'emoji.parquet'}, "
            "columns: {caption: name}, num_samples: 20}\n"
        )
        flags = ["--model", CHECKPOINT, "--samples", 2, "--html", "page.html", "--throughput"]
        done = run("inspect_data.py", "mixture.yaml", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "20 samples read" in done.stdout
        assert done.stdout.count("{<image> x 16}") == 2
        assert "[<image_end><|end|>]" in done.stdout
        page = (tmp_path / "page.html").read_text()
        assert page.count("<img ") == 2 and page.count("<h3>text_to_image") == 2
        assert "training step" in done.stdout

    def test_no_mixture(self, tmp_path, monkeypatch):
        (tmp_path / "empty.yaml").write_text("seed: 1\n")
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", str(tmp_path / "empty.yaml"), "--model", str(CHECKPOINT)])
        with pytest.raises(SystemExit, match="empty.yaml has no mixture"):
            runpy.run_path(str(EXAMPLES / "inspect_data.py"), run_name="__main__")


@pytest.mark.slow
class TestTrainVisualizer:
    FLAGS = ("--model", CHECKPOINT, "--base", CHECKPOINT, "--cpu", "--batch-size", 3, "--schedule", "constant")
    FLAGS += ("--learning-rate", 1e-3, "--accumulation", 2, "--checkpoint-every", 2, "--ema")
    FLAGS += ("--validation-steps", 2, "--validation-pictures", 2)

    def train(self, cwd, *flags):
        done = run("train_visualizer.py", EXAMPLES / "emoji" / "emoji.parquet", *self.FLAGS, *flags, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done

    def test_resumed_is_uninterrupted(self, tmp_path):
        """The same pictures with the same noise, and the same moving average; the tower's tokens cached or not."""
        self.train(tmp_path, "--output", "whole", "--steps", 4, "--validation-every", 4)
        self.train(tmp_path, "--output", "cut", "--steps", 2)
        shutil.rmtree(tmp_path / "cut" / "unet")
        (tmp_path / "cut" / "checkpoint-3").mkdir()  # a save that was interrupted
        again = self.train(tmp_path, "--output", "cut", "--steps", 4)
        assert "going on from cut/checkpoint-2" in again.stdout
        whole, cut = (MetaMorphPipeline.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
        before = MetaMorphPipeline.from_pretrained(CHECKPOINT)
        for part in ("unet", "projector"):
            weights = getattr(whole, part).state_dict()
            assert any((weights[n].float() != w.float()).any() for n, w in getattr(before, part).state_dict().items())
            for name, weight in getattr(cut, part).state_dict().items():
                assert torch.equal(weight, weights[name]), name
        grid = Image.open(tmp_path / "whole" / "validation" / "step-000004.png")
        assert grid.size == (5 * 64, 2 * 64)  # an original and four guidance scales, of two pictures
        card = (tmp_path / "whole" / "README.md").read_text()
        assert "| learning rate | 0.001 |" in card and "![reconstructions](reconstructions.png)" in card
        assert Image.open(tmp_path / "whole" / "reconstructions.png").size == grid.size
        assert "nothing left to train" in self.train(tmp_path, "--output", "cut", "--steps", 4).stdout

    def test_updates_go_on_over_the_ends_of_epochs(self, tmp_path):
        """Three batches an epoch, two an update: resumed in the middle of an epoch, it is the same run."""
        (tmp_path / "pictures").mkdir()
        for place in range(9):
            Image.new("RGB", (64, 64), (25 * place, 0, 0)).save(tmp_path / "pictures" / f"{place}.png")
        shutil.copytree(CHECKPOINT, tmp_path / "base")
        index = json.loads((tmp_path / "base" / "model_index.json").read_text())
        (tmp_path / "base" / "model_index.json").write_text(json.dumps({**index, "instruction_template": "Draw {}!"}))
        flags = ["--model", tmp_path / "base", *self.FLAGS[2:]]
        for output, steps in (("whole", 4), ("cut", 1), ("cut", 4)):
            chosen = [*flags, "--output", output, "--steps", steps, "--checkpoint-every", 1]
            done = run("train_visualizer.py", tmp_path / "pictures", *chosen, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        whole, cut = (MetaMorphPipeline.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
        for name, weight in cut.unet.state_dict().items():
            assert torch.equal(weight, whole.unet.state_dict()[name]), name
        assert whole.config.instruction_template == "Draw {}!"
        states = [torch.load(tmp_path / name / "checkpoint-4" / "optimizer.bin") for name in ("whole", "cut")]
        assert [int(state["state"][0]["step"]) for state in states] == [4, 4]

    def test_two_processes_see_disjoint_data(self, tmp_path):
        """And together all of it, in each epoch; from a webdataset, with learned unconditional states."""
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for place in range(8):
                Image.new("RGB", (64, 64), (30 * place, 0, 0)).save(tmp_path / f"{place}.png")
                tar.add(tmp_path / f"{place}.png", f"{place}.png")
        (tmp_path / "watched.py").write_text(
            "import json, os, sys\n"
            f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
            "import train_visualizer\n"
            "seen, collate = [], train_visualizer.Collate.__call__\n"
            "def watched(self, rows):\n"
            "    seen.append([row['image'].convert('RGB').getpixel((0, 0))[0] // 30 for row in rows])\n"
            "    return collate(self, rows)\n"
            "train_visualizer.Collate.__call__ = watched\n"
            "train_visualizer.main()\n"
            "open(f'seen-{os.environ[\"RANK\"]}.json', 'w').write(json.dumps(seen))\n"
        )
        flags = [*self.FLAGS[:5], "--batch-size", 2, "--output", "out", "--steps", 4, "--validation-pictures", 0]
        flags += ["--learned-unconditional", "--conditioning-dropout", 0.5, "--warmup", 0, "--learning-rate", 1e-3]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launcher, "watched.py", "shard.tar", *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        one, other = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1))
        epochs = [sum(one[start : start + 2] + other[start : start + 2], []) for start in (0, 2)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
        assert epochs[0] != epochs[1]
        assert MetaMorphPipeline.from_pretrained(tmp_path / "out").projector.unconditional.any()

    def test_lora(self, tmp_path):
        self.train(tmp_path, "--output", "out", "--steps", 2, "--unet", "lora", "--lora-rank", 4, "--snr-gamma", 5)
        assert (tmp_path / "out" / "unet_lora" / "pytorch_lora_weights.safetensors").is_file()
        made, before = (MetaMorphPipeline.from_pretrained(folder).unet for folder in (tmp_path / "out", CHECKPOINT))
        adapted = MetaMorphPipeline.from_pretrained(CHECKPOINT).unet
        adapted.load_lora_adapter(str(tmp_path / "out" / "unet_lora"), prefix=None, use_safetensors=True)
        inputs = (torch.randn(1, 32, 8, 8), 500, torch.randn(1, 16, 192))
        with torch.no_grad():
            expected, found = adapted(*inputs).sample, made(*inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert made.state_dict().keys() == before.state_dict().keys()
        moved = {n for n, w in made.state_dict().items() if not torch.allclose(w, before.state_dict()[n].float())}
        assert moved and all(any(f".{part}." in name for part in ("to_q", "to_k", "to_v", "to_out")) for name in moved)
