"""The example scripts, run as a user runs them."""

import io
import json
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModel
from trl import ModelConfig, TrlParser

from metamorph_hf import MetaMorphPipeline, VPiTConfig


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


class TestTrainVPiT:
    """What the README's journey does, with fewer steps, on the pictures and the model of the repository."""

    def test_lora(self, tmp_path):
        config = EXAMPLES / "configs" / "cpu_smoke.yaml"
        flags = ["--max_steps", 4, "--sample_steps", 4, "--eval_samples", 4, "--use_peft", "--lora_r", 4]
        flags += ["--model_name_or_path", CHECKPOINT, "--visualizer", CHECKPOINT, "--eval_strategy", "steps"]
        done = run("train_vpit.py", "--config", config, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        out = tmp_path / "runs" / "smoke"
        (sample,) = json.loads((out / "samples" / "step-000004.json").read_text())
        assert sample["answer"].count("<image>") == len(sample["images"])
        facts = json.loads((out / "training_facts.json").read_text())
        assert (facts["steps"], facts["adapter"]) == (4, "LORA, rank 4, alpha 32")
        for folder in (out, out / "merged"):
            assert "| adapter | LORA, rank 4, alpha 32 |" in (folder / "README.md").read_text()
        logs = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        assert any("eval_visual_loss" in log or "eval_text_loss" in log for log in logs)
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(CHECKPOINT / "model", dtype="float32"), out)
        merged = AutoModel.from_pretrained(out / "merged")
        ids = torch.arange(7, 27).unsqueeze(0)
        with torch.no_grad():
            expected, found = adapted.eval()(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
        # The merged model is saved in the base's float16.
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("precompute", [False, True])
    def test_webdataset(self, tmp_path, precompute):
        """Pictures and captions of a tar, one of them broken; as a stream, and with visual tokens made beforehand."""
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for number in range(8):
                pixels = io.BytesIO()
                Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(pixels, "png")
                data = b"broken" if number == 5 else pixels.getvalue()
                for ending, content in (("png", data), ("txt", b"a red square")):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        source = {
            "task": "text_to_image",
            "path": "webdataset",
            "data_files": "shard.tar",
            "streaming": not precompute,
        }
        config = {
            **yaml.safe_load((EXAMPLES / "configs" / "cpu_smoke.yaml").read_text()),
            "mixture": [source],
            "output_dir": "out",
            "on_bad_sample": "skip",
            "max_bad_share": 0.5,
            "max_steps": 4,
            "precompute": precompute,
            "sample_steps": 0,
        }
        (tmp_path / "tar.yaml").write_text(yaml.safe_dump(config))
        flags = ["--config", "tar.yaml", "--model_name_or_path", CHECKPOINT, "--per_device_train_batch_size", 2]
        done = run("train_vpit.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        facts = json.loads((tmp_path / "out" / "training_facts.json").read_text())
        assert facts["steps"] == 4 and facts["last visual_loss"] < "0"
        (rejected,) = (tmp_path / "out").glob("rejected*")
        assert "0005" in rejected.read_text()

    @pytest.mark.parametrize("config", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_configurations_are_read(self, tmp_path, monkeypatch, config):
        monkeypatch.syspath_prepend(EXAMPLES)
        from train_vpit import DataArguments

        flags = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
        data, training, model = TrlParser((DataArguments, VPiTConfig, ModelConfig)).parse_args_and_config(flags)
        written = yaml.safe_load(config.read_text())
        for name, value in written.items():
            if name not in ("output_dir", "bf16", "mixture", "report_to"):
                holder = next(part for part in (data, training, model) if hasattr(part, name))
                assert getattr(holder, name) == pytest.approx(value), name
        assert (data.mixture is None) == ("mixture" not in written)

    def test_without_a_model(self, tmp_path, monkeypatch, capsys):
        flags = ["train_vpit.py", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]
        monkeypatch.setattr(sys, "argv", flags)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(EXAMPLES / "train_vpit.py"), run_name="__main__")
        assert "name a model to start from" in capsys.readouterr().err


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
