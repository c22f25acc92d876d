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
from helpers import import_example, run_example
from peft import PeftModel
from PIL import Image
from transformers import AutoModel
from trl import ModelConfig, TrlParser

from metamorph_hf import MetaMorphPipeline, VPiTConfig


EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "emoji" / "checkpoint"


class TestGenerate:
    def test_text_to_image(self, tmp_path):
        done = run_example("generate.py", "a red apple", "--out", "apple.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "saved apple.png (64x64)" in done.stdout
        image = Image.open(tmp_path / "apple.png").convert("RGB")
        pixels = list(image.resize((8, 8)).crop((2, 2, 6, 6)).getdata())
        reddish = sum(red > 1.5 * green and red > 1.5 * blue for red, green, blue in pixels)
        assert reddish >= len(pixels) / 2, "the middle of a red apple is not red"

    @pytest.fixture
    def generate(self, tmp_path, monkeypatch, capsys):
        """Run the script in this process and in `tmp_path`; return its output."""
        script = import_example("generate.py")
        monkeypatch.chdir(tmp_path)

        def run(*arguments) -> str:
            monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
            script.main()
            return capsys.readouterr().out

        return run

    def test_question_about_an_image(self, generate):
        """With the pipeline's model folder as --model, which stands for the pipeline."""
        Image.new("RGB", (80, 60), "red").save("image.png")
        assert generate("What is this?", "--image", "image.png", "--model", CHECKPOINT / "model").strip()

    @pytest.mark.parametrize("name", ["broken.png", "nowhere.png"])
    def test_unreadable_image(self, generate, name):
        Path("broken.png").write_bytes(b"not an image")
        with pytest.raises(SystemExit, match=name):
            generate("What is this?", "--image", name)

    def test_folder_without_a_pipeline(self, generate, tmp_path):
        with pytest.raises(SystemExit, match="is not a pipeline folder: it has no model_index.json"):
            generate("a cat", "--model", tmp_path)

    def test_half_written_pipeline(self, generate):
        shutil.copytree(CHECKPOINT, "half")
        weights = Path("half/model/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(SystemExit, match="half cannot be loaded; it is missing or incomplete"):
            generate("a cat", "--model", "half")

    def test_prompt_longer_than_the_context(self, generate):
        with pytest.raises(SystemExit, match="longer than the model's context of 512 tokens"):
            generate("a cat and " * 400)

    def test_image_that_cannot_be_written(self, generate):
        with pytest.raises(SystemExit, match="nowhere"):
            generate("a cat", "--steps", 1, "--out", "nowhere/cat.png")


class TestCommon:
    def test_models_are_found_in_pipelines(self, tmp_path):
        common = import_example("common.py")
        parts = (str(CHECKPOINT / "model"), str(CHECKPOINT / "processor"))
        assert common.resolve_model(CHECKPOINT) == parts
        assert common.resolve_model(CHECKPOINT / "model") == parts
        assert common.resolve_model(tmp_path) == (str(tmp_path), str(tmp_path))
        assert common.resolve_model("user/repo") == ("user/repo", "user/repo")


@pytest.mark.slow
class TestBenchmark:
    def test_generation(self, tmp_path):
        sizes = ("--hidden", 64, "--layers", 1, "--vocabulary", 200, "--visual-tokens", 4, "--repeats", 1)
        small = ("--tower-hidden", 64, "--tower-layers", 1, "--prompts", 16, "--images", 1)
        done = run_example("benchmark.py", *sizes, *small, "--json", "result.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "result.json").read_text())["results"]
        assert json.loads(done.stdout.splitlines()[-1])["results"] == results
        assert len(results) == 12 and all(value > 0 for value in results.values())

    def test_pipeline(self, tmp_path):
        done = run_example("benchmark.py", "--pipeline", "--repeats", 1, "--denoising-steps", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        assert len(results) == 3 and all(value > 0 for value in results.values())


@pytest.mark.slow
class TestEmojiRecipe:
    def test_quick_passes_all_steps_and_resumes(self, tmp_path):
        arguments = ("--quick", "--work", tmp_path / "work", "--out", tmp_path / "out")
        done = run_example("emoji/train.py", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pipe = MetaMorphPipeline.from_pretrained(tmp_path / "out")
        assert len(pipe.decode_visual_tokens(torch.randn(2, 16, 32), num_inference_steps=2)) == 2
        again = run_example("emoji/train.py", *arguments, cwd=tmp_path)  # nothing is left to train
        assert again.returncode == 0, again.stderr
        assert "SigLIP" in done.stdout and "SigLIP" not in again.stdout
        assert "U-Net" in done.stderr and "U-Net" not in again.stderr

    def test_evaluate(self, tmp_path):
        done = run_example("emoji/evaluate.py", "--limit", "32", "--sheet", tmp_path / "sheet.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers = json.loads(done.stdout)
        assert numbers["category_twitter_held_out"] > 40  # chance is about 15 %
        assert numbers["unseen_phrasings_top1"] > 70 and numbers["decoded_and_encoded_again_top1"] > 60
        assert numbers["seen_phrasings_top5"] >= numbers["seen_phrasings_top1"]
        assert numbers["generate_seconds"] > 0
        assert (tmp_path / "sheet.png").is_file()

    def test_evaluate_without_a_pipeline(self, tmp_path):
        done = run_example("emoji/evaluate.py", "--checkpoint", tmp_path, cwd=tmp_path)
        assert done.returncode == 1
        assert "is not a pipeline folder" in done.stderr and "Traceback" not in done.stderr


run = run_example  # for the three classes below


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
