"""The example scripts, run as a user runs them."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from helpers import import_example, run_example
from PIL import Image

from metamorph_hf import MetaMorphPipeline
from metamorph_hf.vpit import text_loss


EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "emoji" / "checkpoint"


class TestGenerate:
    def test_text_to_image(self, tmp_path):
        done = run_example("generate.py", "a red apple", "--out", "apple.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        image = Image.open(tmp_path / "apple.png").convert("RGB")
        assert f"saved apple.png ({image.width}x{image.height})" in done.stdout
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

    def test_files_that_exist_are_kept(self, generate):
        Path("mine.png").write_text("precious")
        for options, expected in (([], "mine_2.png"), ([], "mine_3.png"), (["--overwrite"], "mine.png")):
            output = generate("a red apple", "--steps", 1, "--out", "mine.png", *options)
            assert f"saved {expected} (128x128)" in output
            Image.open(expected).verify()
            assert expected == "mine.png" or Path("mine.png").read_text() == "precious"

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
        with pytest.raises(SystemExit, match="cannot be loaded; it is missing.*no file named model_index.json"):
            generate("a cat", "--model", tmp_path)

    def test_half_written_pipeline(self, generate):
        shutil.copytree(CHECKPOINT, "half")
        weights = Path("half/model/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(SystemExit, match="half cannot be loaded; it is missing or incomplete"):
            generate("a cat", "--model", "half")

    def test_prompt_longer_than_the_context(self, generate):
        with pytest.raises(SystemExit, match="but the model's context holds 512"):
            generate("a cat and " * 400)

    @pytest.mark.parametrize("out", ["nowhere/cat.png", "nowhere", "nowhere.txt"])
    def test_image_that_cannot_be_written(self, generate, monkeypatch, out):
        """It is refused before the model is loaded."""
        monkeypatch.setattr("metamorph_hf.cli.load_pipeline", lambda *args: pytest.fail("the model is loaded"))
        with pytest.raises(SystemExit, match="nowhere"):
            generate("a cat", "--steps", 1, "--out", out)


class TestCommon:
    def test_models_are_found_in_pipelines(self, tmp_path):
        common = import_example("common.py")
        parts = (str(CHECKPOINT / "model"), str(CHECKPOINT / "processor"))
        assert common.resolve_model(CHECKPOINT) == parts
        assert common.resolve_model(CHECKPOINT / "model") == parts
        for other in (tmp_path, CHECKPOINT / "modle", "user/repo"):
            assert common.resolve_model(other) == (str(other), str(other))

    def test_class_that_the_index_names(self, components, tmp_path):
        common = import_example("common.py")
        MetaMorphPipeline(**components).save_pretrained(tmp_path / "plain")
        DDPMPipeline(components["unet"], DDPMScheduler()).save_pretrained(tmp_path / "other")
        for folder in (
            CHECKPOINT,
            CHECKPOINT / "model",
            tmp_path / "plain",
        ):  # with and without code, and a part of it
            assert type(common.load_pipeline(folder, "cpu", any_class=True)) is MetaMorphPipeline
        assert type(common.load_pipeline(tmp_path / "other", "cpu", any_class=True)) is DDPMPipeline

    def test_folder_of_no_pipeline(self, tmp_path):
        for any_class in (True, False):
            with pytest.raises(SystemExit, match="no .*model_index.json"):
                import_example("common.py").load_pipeline(tmp_path, any_class=any_class)


@pytest.mark.slow
class TestBenchmark:
    def test_generation(self, tmp_path):
        sizes = ("--hidden", 64, "--layers", 1, "--vocabulary", 200, "--visual-tokens", 4, "--repeats", 1)
        done = run_example("benchmark.py", *sizes, "--prompts", 16, "--compile", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        assert len(results) == 16 and all(value > 0 for value in results.values())

    def test_pipeline(self, tmp_path):
        done = run_example("benchmark.py", "--pipeline", "--repeats", 1, "--denoising-steps", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        assert len(results) == 3 and all(value > 0 for value in results.values())


@pytest.mark.slow
class TestEmojiRecipe:
    def test_quick_passes_all_steps_and_resumes(self, tmp_path):
        arguments = ("--quick", "--work", tmp_path / "work", "--out", tmp_path / "out")
        done = run_example("train_emoji.py", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pipe = MetaMorphPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
        (image,) = pipe("a red apple", generation_kwargs={"force_image": True}, num_inference_steps=2).images
        assert image.size == (128, 128)
        again = run_example("train_emoji.py", *arguments, cwd=tmp_path)  # nothing is left to train
        assert again.returncode == 0, again.stderr
        assert "SigLIP" in done.stdout and "SigLIP" not in again.stdout
        assert "U-Net" in done.stderr and "U-Net" not in again.stderr

    def test_evaluate(self, tmp_path, monkeypatch, capsys):
        """On a tenth of the emoji, so that few have to be drawn, and with few denoising steps."""
        script = import_example("evaluate_emoji.py")
        rows, load = script.load_rows(quick=True), script.load_pipeline

        def load_quick_pipeline(*args, **kwargs):
            pipe = load(*args, **kwargs)
            pipe.register_to_config(default_num_inference_steps=3)
            return pipe

        monkeypatch.setattr(script, "load_pipeline", load_quick_pipeline)
        (tmp_path / "prompts.yaml").write_text("a cat: cat face|dog face\nthe sun: sun\na rose: rose\n")
        monkeypatch.setattr(script, "load_rows", lambda: rows)
        monkeypatch.setattr(script, "EVERYDAY_PROMPTS", tmp_path / "prompts.yaml")
        command = ["evaluate_emoji.py", "--limit", "4", "--sheet", str(tmp_path / "sheet.png")]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        numbers = json.loads(capsys.readouterr().out)
        assert numbers["category_twitter_held_out"] > 40
        assert numbers["seen_phrasings_top5"] >= numbers["seen_phrasings_top1"] > 60
        assert numbers["psnr_trained"] > 15 and 0.5 < numbers["sharpness_trained"] < 1.5
        assert min(value for name, value in numbers.items() if name.startswith("judge_")) > 90
        assert Image.open(tmp_path / "sheet.png").width == 900

    def test_compare_decodings(self, tmp_path):
        done = run_example("compare_decoding.py", "--quick", "--out", tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        decodings = ["autoregressive", "autoregressive, noise 2.5", "parallel"]
        assert [result["decoding"] for result in results] == decodings
        assert all(f"| {decoding} | " in done.stdout for decoding in decodings)

    def test_evaluate_without_a_pipeline(self, tmp_path):
        done = run_example("evaluate_emoji.py", "--checkpoint", tmp_path, cwd=tmp_path)
        assert done.returncode == 1
        assert "no file named model_index.json" in done.stderr and "Traceback" not in done.stderr


class TestGpuBenchmark:
    @pytest.mark.slow
    def test_tiny_models_on_a_cpu(self, tmp_path):
        done = run_example("benchmarks/gpu.py", "--tiny", "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / "gpu.json").read_text())
        assert content["facts"]["models"].startswith("tiny")
        rows = {row["what"]: row for row in content["rows"]}
        for attention in ("eager", "sdpa"):
            assert float(rows[f"packed loss, {attention}"]["difference"]) < 1e-5
        for kind in ("1 B, full", "8 B, LoRA", "8 B, QLoRA"):
            layouts = [row["layout"] for row in content["rows"] if row["what"] == f"training, {kind}, sdpa"]
            assert layouts == ["padded", "packed"]
        assert {"generation, 1 B, parallel, static, batch 2", "decoding, U-Net of Stable Diffusion 1.5"} < set(rows)
        missing = ("flash_attn is not installed", "liger_kernel is not installed")
        for name, reason in content["left_out"].items():
            assert "compiled" in name or reason.endswith(missing), reason
        table = (tmp_path / "gpu.md").read_text()
        assert f"torch {torch.__version__}" in table and "| packed loss, sdpa |" in table

    def test_ends_by_itself(self, tmp_path):
        """What does not fit the time is named."""
        done = run_example("benchmarks/gpu.py", "--tiny", "--device", "cpu", "--minutes", "0.02", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "gpu.json").read_text())["left_out"]

    def test_parts(self, tmp_path):
        flags = ("--tiny", "--device", "cpu", "--only")
        done = run_example("benchmarks/gpu.py", *flags, "loss, sdpa", "loss, eager", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        assert [row["what"] for row in rows] == ["packed loss, eager", "packed loss, sdpa"]
        done = run_example("benchmarks/gpu.py", *flags, "painting", cwd=tmp_path)
        assert done.returncode == 2 and "one of the parts ['painting']" in done.stderr

    @pytest.mark.parametrize(("kind", "is_fused"), [("trainer", True), ("chunks", False)])
    def test_cross_entropy_is_the_named_one(self, monkeypatch, kind, is_fused):
        """The trainer's loss falls back to the model's own where it does not pay."""
        script, calls = import_example("benchmarks.gpu"), []
        fused = text_loss.ChunkedLogProbFunction
        monkeypatch.setattr(fused, "apply", lambda *args, apply=fused.apply: calls.append(1) or apply(*args))
        report = SimpleNamespace(device=torch.device("cpu"), time=lambda run: run() or 1.0)
        script.measure_cross_entropy(report, SimpleNamespace(tiny=True), kind)
        assert bool(calls) == is_fused

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, tmp_path):
        done = run_example("benchmarks/gpu.py", cwd=tmp_path)
        assert done.returncode == 2 and "--tiny --device cpu" in done.stderr


class TestTrainingBenchmark:
    @pytest.mark.slow
    def test_small_sizes(self, tmp_path):
        flags = ["--hidden", 64, "--layers", 1, "--vocabulary", 8000, "--batch", 2, "--repeats", 1]
        done = run_example("benchmark_training.py", "--parts", "packing", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        assert results["share of padding, packed (at most 0.03)"] < 0.03 < results["share of padding, padded batches"]
        assert results["real tokens per second, packed / padded (at least 1.6)"] > 0
