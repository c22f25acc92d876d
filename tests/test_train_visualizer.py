"""The training of a visualizer: its parts, and the script as a user runs it."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from helpers import EMOJI_CHECKPOINT as CHECKPOINT
from helpers import EXAMPLES_FOLDER, import_example, run_example
from PIL import Image

from metamorph_hf import MetaMorphPipeline
from metamorph_hf.visualizer_training import diffusion_loss, save_ema_with


def run(*arguments, cwd, status: int = 0) -> subprocess.CompletedProcess:
    done = run_example("train_visualizer.py", *arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    return done


class TestDiffusionLoss:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("snr_gamma", [None, 5.0])
    def test_perfect_prediction_has_no_loss(self, prediction_type, snr_gamma):
        """The clean latents are known, so that noise and velocity follow from the noisy latents."""
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        clean = torch.randn(4, 2, 3, 3)

        def predict(noisy, timesteps):
            alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]

        loss = diffusion_loss(predict, scheduler, clean, torch.Generator().manual_seed(0), snr_gamma=snr_gamma)
        assert loss.item() == pytest.approx(0.0, abs=1e-6)

    def test_timesteps_stay_below_their_number(self):
        """With this seed, the largest sum of the 256 rounds up to 1."""
        generator, seen = torch.Generator().manual_seed(30661), []
        predict = lambda noisy, timesteps: seen.append(timesteps) or noisy  # noqa: E731
        diffusion_loss(predict, DDPMScheduler(), torch.zeros(256, 1, 1, 1), generator)
        assert seen[0].max() == 999

    def test_min_snr_weights_are_those_of_the_paper(self):
        """For epsilon, the weight of an image is min(SNR, gamma) / SNR."""
        scheduler, seen = DDPMScheduler(), []

        def predict(noisy, timesteps):
            seen.append((noisy, timesteps))
            return torch.zeros_like(noisy)

        clean = torch.zeros(4, 2, 3, 3)
        loss = diffusion_loss(predict, scheduler, clean, torch.Generator().manual_seed(0), snr_gamma=5.0)
        ((noisy, timesteps),) = seen
        alpha = scheduler.alphas_cumprod[timesteps]
        snr = alpha / (1 - alpha)
        squares = noisy.square().mean((1, 2, 3)) / (1 - alpha)  # of the noise, as the clean latents are zeros
        torch.testing.assert_close(loss, (squares * snr.clamp(max=5.0) / snr).mean())


def test_cached_visual_tokens_are_those_of_the_model(tiny_model, tiny_processor, tiny_images):
    """Models with the same tower may differ in what they make of its output."""
    script, tower = import_example("train_visualizer"), tiny_model().model.vision_tower.state_dict()
    dataset, counts = Dataset.from_dict({"image": tiny_images}).cast_column("image", ImageFeature()), []
    for change in ({}, {"normalize_visual_tokens": False}, {"num_image_tokens": 1}, {}):
        model = tiny_model(**change)
        model.model.vision_tower.load_state_dict(tower)
        training = object.__new__(script.VisualizerTraining)  # what the method reads, without a visualizer
        training.model, training.accelerator = model, Accelerator(cpu=True)
        preprocess = SimpleNamespace(preprocess=lambda images: torch.zeros(len(images), 3, 8, 8))
        training.collate = script.Collate(tiny_processor, SimpleNamespace(image_processor=preprocess), 8)
        pixels = training.collate([{"image": image} for image in tiny_images])["pixel_values"]
        expected, encode = model.get_visual_tokens(pixels), training.encode
        training.encode = lambda batch, encode=encode: counts.append(1) or encode(batch)
        found = training.cache_visual_tokens(dataset).with_format("torch")["visual_tokens"][:]
        torch.testing.assert_close(found, expected.detach())
    assert len(counts) == 3  # the last model is the first one


class TestMovingAverage:
    @staticmethod
    def build(value: float) -> tuple[Accelerator, torch.nn.Linear, EMAModel]:
        accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, value)
        ema = EMAModel(list(model.parameters()), decay=0.5)
        save_ema_with(accelerator, ema)
        return accelerator, model, ema

    def test_travels_as_safetensors(self, tmp_path):
        accelerator, model, ema = self.build(1.0)
        torch.nn.init.zeros_(model.weight)
        for _ in range(3):
            ema.step(model.parameters())
        accelerator.save_state(str(tmp_path))
        assert (tmp_path / "ema.safetensors").is_file() and not list(tmp_path.glob("custom_checkpoint_*"))
        accelerator, _, again = self.build(5.0)
        accelerator.load_state(str(tmp_path))
        assert again.optimization_step == 3
        assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, ema.shadow_params))

    def test_pickle_of_a_stranger_is_not_read(self, tmp_path):
        accelerator, _, _ = self.build(1.0)
        accelerator.save_state(str(tmp_path))
        (tmp_path / "custom_checkpoint_0.pkl").write_bytes(b"cos\nsystem\n(S'touch read'\ntR.")
        with pytest.raises(RuntimeError, match="custom checkpoints"):
            accelerator.load_state(str(tmp_path))


class TestOutputFolder:
    @pytest.fixture
    def script(self):
        return import_example("train_visualizer")

    @staticmethod
    def claim(script, monkeypatch, output, *flags):
        command = ["train_visualizer.py", "images", "--model", "m", "--base", "b", "--output", output, *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        script.claim_output(script.parse_args(), Accelerator(cpu=True))

    def test_continues_the_same_run_only(self, script, monkeypatch, tmp_path):
        self.claim(script, monkeypatch, tmp_path / "run")
        self.claim(script, monkeypatch, tmp_path / "run", "--seed", 1)  # there is nothing to lose yet
        (tmp_path / "run" / "checkpoint-2").mkdir()
        self.claim(script, monkeypatch, tmp_path / "run", "--seed", 1, "--steps", 5, "--workers", 1)
        with pytest.raises(SystemExit, match="holds a run with another unet, seed: choose another --output"):
            self.claim(script, monkeypatch, tmp_path / "run", "--unet", "lora")
        assert (tmp_path / "run" / "checkpoint-2").is_dir()
        self.claim(script, monkeypatch, tmp_path / "run", "--unet", "lora", "--overwrite")
        assert not (tmp_path / "run" / "checkpoint-2").exists()

    @pytest.mark.parametrize("record", [None, "{", "[1]"])
    def test_leaves_other_folders_alone(self, script, monkeypatch, tmp_path, record):
        (tmp_path / "README.md").write_text("my card")
        if record is not None:
            (tmp_path / "run.json").write_text(record)
        with pytest.raises(SystemExit, match="is not empty, and not a run of this script"):
            self.claim(script, monkeypatch, tmp_path)
        self.claim(script, monkeypatch, tmp_path, "--overwrite")
        assert (tmp_path / "README.md").read_text() == "my card"

    @pytest.mark.parametrize("names", [("m", "pipe"), ("pipe/model", "b"), ("pipe", "b")])
    def test_pipeline_to_start_from_is_not_overwritten(self, script, monkeypatch, tmp_path, names):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "pipe" / "model").mkdir(parents=True)
        (tmp_path / "pipe" / "model_index.json").write_text('{"model": ["metamorph_hf", "x"]}')
        with pytest.raises(SystemExit, match="pipe holds pipe.*, from which training starts: choose another --output"):
            self.claim(script, monkeypatch, "pipe", "--overwrite", "--model", names[0], "--base", names[1])
        assert (tmp_path / "pipe" / "model_index.json").is_file()

    def test_folder_that_cannot_be_written(self, script, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match="file/run cannot be written: .*Not a directory"):
            self.claim(script, monkeypatch, tmp_path / "file" / "run")

    @pytest.mark.parametrize("damage", ["cut", "missing", "no record", "{", "3", '{"step": 2}', '{"sizes": [1]}'])
    def test_damaged_checkpoints(self, script, tmp_path, damage):
        folder = tmp_path / "checkpoint-2"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345678")
        (folder / "step.json").write_text(json.dumps({"step": 2, "sizes": {"weights": 8}}))
        assert script.is_complete(folder)
        if damage == "cut":
            (folder / "weights").write_bytes(b"1234")
        elif damage in ("missing", "no record"):
            (folder / {"missing": "weights", "no record": "step.json"}[damage]).unlink()
        else:
            (folder / "step.json").write_text(damage)
        assert not script.is_complete(folder)

    def test_names_of_checkpoints(self, script, tmp_path):
        for name in ("checkpoint-10", "checkpoint-9", "checkpoint-8.bak", "checkpoint-x"):
            (tmp_path / name).mkdir()
        (tmp_path / "checkpoint-11").touch()
        assert [*map(script.read_step, script.find_checkpoints(tmp_path))] == [9, 10]


@pytest.mark.slow
class TestTrainVisualizer:
    FLAGS = ("--model", CHECKPOINT, "--base", CHECKPOINT, "--cpu", "--batch-size", 3, "--schedule", "constant")
    FLAGS += ("--learning-rate", 1e-3, "--accumulation", 2, "--checkpoint-every", 2, "--ema")
    FLAGS += ("--validation-steps", 2, "--validation-images", 2)

    @pytest.fixture
    def train(self, emoji_parquet, tmp_path):
        return lambda *flags: run(emoji_parquet, *self.FLAGS, *flags, cwd=tmp_path)

    def test_resumed_is_uninterrupted(self, train, tmp_path):
        """A resumed run sees the same images with the same noise and has the same moving average."""
        train("--output", "whole", "--steps", 4, "--validation-every", 4)
        train("--output", "cut", "--steps", 2)
        shutil.rmtree(tmp_path / "cut" / "unet")
        (tmp_path / "cut" / "checkpoint-3").mkdir()  # a save that was interrupted
        shutil.copytree(tmp_path / "cut" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2.bak")
        (tmp_path / "cut" / "checkpoint-9").write_text("a file")
        again = train("--output", "cut", "--steps", 4)
        assert (
            "cut/checkpoint-3 is incomplete" in again.stdout and "continuing from cut/checkpoint-2\n" in again.stdout
        )
        assert (tmp_path / "cut" / "checkpoint-2.bak").is_dir() and (tmp_path / "cut" / "checkpoint-9").is_file()
        whole, cut = (MetaMorphPipeline.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
        before = MetaMorphPipeline.from_pretrained(CHECKPOINT)
        for part in ("unet", "projector"):
            weights = getattr(whole, part).state_dict()
            assert any((weights[n].float() != w.float()).any() for n, w in getattr(before, part).state_dict().items())
            for name, weight in getattr(cut, part).state_dict().items():
                assert torch.equal(weight, weights[name]), name
        grid = Image.open(tmp_path / "whole" / "validation" / "step-000004.png")
        height, width = before.default_size
        assert grid.size == (5 * width, 2 * height)  # an original and four guidance scales, of two images
        card = (tmp_path / "whole" / "README.md").read_text()
        assert "| learning rate | 0.001 |" in card and "![reconstructions](reconstructions.png)" in card
        # The weights of the last step differ from the averaged ones, which are validated and saved.
        assert list(Image.open(tmp_path / "whole" / "reconstructions.png").getdata()) == list(grid.getdata())
        (tmp_path / "cut" / "README.md").write_text("my card")
        assert "cut is finished" in train("--output", "cut", "--steps", 4).stdout
        assert (tmp_path / "cut" / "README.md").read_text() == "my card"

    def test_accumulation_continues_over_the_ends_of_epochs(self, tmp_path):
        """With three batches per epoch and two per step, a run that is resumed within an epoch is the same."""
        (tmp_path / "images").mkdir()
        for index in range(9):
            Image.new("RGB", (64, 64), (25 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        shutil.copytree(CHECKPOINT, tmp_path / "base")
        index_file = tmp_path / "base" / "model_index.json"
        index_file.write_text(
            json.dumps({**json.loads(index_file.read_text()), "instruction_template": "Generate {}!"})
        )
        flags = ["--model", tmp_path / "base", *self.FLAGS[2:]]
        for output, steps in (("whole", 4), ("cut", 1), ("cut", 4)):
            chosen = [*flags, "--output", output, "--steps", steps, "--checkpoint-every", 1]
            run(tmp_path / "images", *chosen, cwd=tmp_path)
        whole, cut = (MetaMorphPipeline.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
        for name, weight in cut.unet.state_dict().items():
            assert torch.equal(weight, whole.unet.state_dict()[name]), name
        assert whole.config.instruction_template == "Generate {}!"
        states = [torch.load(tmp_path / name / "checkpoint-4" / "optimizer.bin") for name in ("whole", "cut")]
        assert [int(state["state"][0]["step"]) for state in states] == [4, 4]

    def test_two_processes_see_disjoint_data(self, tmp_path):
        """Together they see all of a webdataset in each epoch. The unconditional states are learned."""
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for index in range(8):
                Image.new("RGB", (64, 64), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
                tar.add(tmp_path / f"{index}.png", f"{index}.png")
        (tmp_path / "watched.py").write_text(
            "import json, os, sys\n"
            f"sys.path.insert(0, {str(EXAMPLES_FOLDER)!r})\n"
            "import train_visualizer\n"
            "from metamorph_hf.image_reading import read_image\n"
            "seen, collate = [], train_visualizer.Collate.__call__\n"
            "def watched(self, rows):\n"
            "    seen.append([read_image(row['image']).getpixel((0, 0))[0] // 30 for row in rows])\n"
            "    return collate(self, rows)\n"
            "train_visualizer.Collate.__call__ = watched\n"
            "train_visualizer.main()\n"
            "open(f'seen-{os.environ[\"RANK\"]}.json', 'w').write(json.dumps(seen))\n"
        )
        flags = [*self.FLAGS[:5], "--batch-size", 2, "--output", "out", "--steps", 4, "--validation-images", 0]
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

    def test_broken_image_is_named(self, tmp_path):
        (tmp_path / "images").mkdir()
        for index in range(3):
            Image.effect_noise((64, 64), 50).save(tmp_path / "images" / f"{index}.png")
        content = (tmp_path / "images" / "2.png").read_bytes()
        (tmp_path / "images" / "2.png").write_bytes(content[: len(content) // 2])
        flags = [*self.FLAGS, "--output", "out", "--steps", 2, "--validation-images", 0]
        done = run(tmp_path / "images", *flags, cwd=tmp_path, status=1)
        assert re.search(r"The image cannot be read \(\S*images/2.png\): image file is truncated", done.stderr)
        assert "Traceback" not in done.stderr and not (tmp_path / "out" / "model_index.json").exists()

    def test_base_without_a_unet(self, tmp_path):
        (tmp_path / "base").mkdir()
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
        (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
        done = run("images", *self.FLAGS, "--base", "base", "--output", "out", cwd=tmp_path, status=1)
        assert "is a FluxPipeline, which has no U-Net" in done.stderr and "Traceback" not in done.stderr

    def test_lora(self, train, tmp_path):
        train("--output", "out", "--steps", 2, "--unet", "lora", "--lora-rank", 4, "--snr-gamma", 5)
        assert (tmp_path / "out" / "unet_lora" / "pytorch_lora_weights.safetensors").is_file()
        made, before = (MetaMorphPipeline.from_pretrained(folder).unet for folder in (tmp_path / "out", CHECKPOINT))
        adapted = MetaMorphPipeline.from_pretrained(CHECKPOINT).unet
        adapted.load_lora_adapter(str(tmp_path / "out" / "unet_lora"), prefix=None, use_safetensors=True)
        config = before.config
        states = torch.randn(1, 16, config.cross_attention_dim)
        inputs = (torch.randn(1, config.in_channels, 8, 8), 500, states)
        with torch.no_grad():
            expected, found = adapted(*inputs).sample, made(*inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert made.state_dict().keys() == before.state_dict().keys()
        moved = {n for n, w in made.state_dict().items() if not torch.allclose(w, before.state_dict()[n].float())}
        assert moved and all(any(f".{part}." in name for part in ("to_q", "to_k", "to_v", "to_out")) for name in moved)
