"""Saved models and pipelines load with `trust_remote_code=True` in a process that cannot import this package."""

import json

import pytest
import torch
from copy_checkpoint_code import CODE, SOURCES
from diffusers import DDIMScheduler
from helpers import EMOJI_CHECKPOINT, run_as_stranger

from metamorph_hf import GridUNet2DConditionModel, MetaMorphPipeline, PatchAutoencoder, VisualTokenProjector


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_model_and_processor(tiny_model, tiny_processor, tiny_images, tmp_path, decoding):
    model = tiny_model(visual_decoding=decoding)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    tiny_images[0].save(tmp_path / "saved" / "image.png")
    inputs = tiny_processor(text="See <image> here", images=tiny_images[:1], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    options = {"force_image": True, "max_images": 1, "max_new_tokens": 8, "do_sample": False}
    sequences = model.generate(**inputs, **options)

    found = run_as_stranger(
        """
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="See <image> here", images=[Image.open(folder + "/image.png")], return_tensors="pt")
found = []
for auto_class in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found.append(model(**inputs).logits)
options = {"force_image": True, "max_images": 1, "max_new_tokens": 8, "do_sample": False}
found.append(model.generate(**inputs, **options))
""",
        tmp_path / "saved",
        tmp_path,
    )
    *logits, generated = found
    assert len(logits) == 3 and all(torch.equal(each, expected) for each in logits)
    assert torch.equal(generated, sequences)


@pytest.mark.slow
def test_pipeline(tiny_model, tiny_processor, tmp_path):
    torch.manual_seed(0)
    vae = PatchAutoencoder(patch_size=2, latent_channels=4, width=8)
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    pipeline = MetaMorphPipeline(
        model=tiny_model(),
        processor=tiny_processor,
        projector=VisualTokenProjector(16, 8, num_layers=1, num_image_tokens=4, sequence_length=None),
        unet=GridUNet2DConditionModel(**sizes),
        vae=vae,
        scheduler=DDIMScheduler(),
    )
    pipeline.save_pretrained(tmp_path / "saved")
    tokens = torch.nn.functional.normalize(torch.randn(2, 4, 16), dim=-1)
    torch.save(tokens, tmp_path / "saved" / "tokens.pt")

    def decode(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline.decode_visual_tokens(tokens, num_inference_steps=2, generator=generator, output_type="pt")

    found = run_as_stranger(
        """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(folder + "/tokens.pt", weights_only=True)
generator = torch.Generator().manual_seed(0)
found = pipeline.decode_visual_tokens(tokens, num_inference_steps=2, generator=generator, output_type="pt")
assert len(pipeline("an apple", num_inference_steps=1, max_new_tokens=4).text) == 1
pipeline.save_pretrained(folder + "/again")
DiffusionPipeline.from_pretrained(folder + "/again", trust_remote_code=True)
""",
        tmp_path / "saved",
        tmp_path,
    )
    assert torch.equal(found, decode(pipeline))
    again = MetaMorphPipeline.from_pretrained(tmp_path / "saved")  # needs no trust, as the package is installed here
    assert type(again.vae) is PatchAutoencoder
    assert torch.equal(decode(again), decode(pipeline))


def test_the_emoji_checkpoint_carries_the_code_of_today():
    """Copied by `python tests/copy_checkpoint_code.py`."""
    found = {path.relative_to(EMOJI_CHECKPOINT): path.read_text() for path in EMOJI_CHECKPOINT.rglob("*.py")}
    assert found == {path: (SOURCES / path.name).read_text() for path in CODE}


def test_the_emoji_checkpoint_names_no_folder_of_the_machine_that_made_it():
    configs = [json.loads(path.read_text()) for path in EMOJI_CHECKPOINT.rglob("config.json")]
    names = [config["_name_or_path"] for config in configs if "_name_or_path" in config]
    assert len(configs) == 4 and names == ["emoji"] * 3


@pytest.mark.slow
def test_the_emoji_checkpoint_loads_without_the_package(tmp_path):
    found = run_as_stranger(
        """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
output = pipe("a red apple", num_inference_steps=2)
model = transformers.AutoModel.from_pretrained(folder + "/model", trust_remote_code=True)
found = [len(output.images), type(model).__name__]
""",
        EMOJI_CHECKPOINT,
        tmp_path,
    )
    assert found == [1, "MetaMorphForConditionalGeneration"]


def test_the_list_of_code_is_what_saving_writes(tmp_path):
    MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT).save_pretrained(tmp_path)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")} == set(CODE)
