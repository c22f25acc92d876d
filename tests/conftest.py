"""Fixtures for every test: the released implementation's golden numbers, and tiny models of our own."""

import atexit
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path


if "HF_DATASETS_CACHE" not in os.environ:  # tests must not find what earlier ones, or users, have cached
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from helpers import GOLDEN, ROWS, SPECIAL_TOKENS, byte_tokenizer, import_example
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor, VisualTokenProjector
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE


# The workers of pytest-xdist share the cores: more threads than cores slow torch down tenfold.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

sys.path.append(str(Path(__file__).parents[1] / "conversion"))
from convert_metamorph_to_hf import build_processor, convert  # noqa: E402


@dataclass
class Golden:
    """Outputs of the released implementation: `tensors` by name, `facts` (golden.json), the four `images`."""

    tensors: dict[str, torch.Tensor]
    facts: dict
    images: dict[str, Image.Image]
    converted: Path

    def build_model(self, **config) -> MetaMorphForConditionalGeneration:
        """Load the converted checkpoint; `config` overrides. A head of another shape gets random weights."""
        stored = MetaMorphConfig.from_pretrained(self.converted).to_dict()
        return MetaMorphForConditionalGeneration.from_pretrained(
            self.converted, config=MetaMorphConfig(**{**stored, **config}), ignore_mismatched_sizes=True
        )


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Golden:
    converted = tmp_path_factory.mktemp("golden") / "converted"
    convert(GOLDEN / "checkpoint", converted, vision_tower=str(GOLDEN / "siglip"))
    return Golden(
        tensors=load_file(GOLDEN / "golden.safetensors"),
        facts=json.loads((GOLDEN / "golden.json").read_text()),
        images={path.stem: Image.open(path).convert("RGB") for path in sorted((GOLDEN / "images").glob("*.png"))},
        converted=converted,
    )


@pytest.fixture(scope="session")
def golden_model(golden) -> MetaMorphForConditionalGeneration:
    """Return our model with the released weights. Tests must not change its weights or its configuration."""
    return golden.build_model()


@pytest.fixture(scope="session")
def golden_image_processor():
    return AutoImageProcessor.from_pretrained(GOLDEN / "siglip", backend="pil")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(SPECIAL_TOKENS, extra_special_tokens=list(SPECIAL_TOKENS[2:]), padding_side="left")


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer) -> MetaMorphProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=True)
    return MetaMorphProcessor(image_processor, tiny_tokenizer, num_image_tokens=4, chat_template=DEFAULT_CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """Return a function that makes a tiny configuration; keyword arguments override."""

    def make(**config) -> MetaMorphConfig:
        token_id = tiny_tokenizer.convert_tokens_to_ids
        text_config = LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        vision_config = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        defaults = {
            "text_config": text_config,
            "vision_config": vision_config,
            "image_token_id": token_id("<image>"),
            "image_start_token_id": token_id("<image_start>"),
            "image_end_token_id": token_id("<image_end>"),
            "num_image_tokens": 4,
        }
        return MetaMorphConfig(**{**defaults, **config})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Return a function that makes a tiny random model in eval mode; keyword arguments override its config."""

    def make(**config) -> MetaMorphForConditionalGeneration:
        torch.manual_seed(0)
        model = MetaMorphForConditionalGeneration(tiny_config(**config)).eval()
        for parameter in model.parameters():  # with the usual 0.02 all outputs would be nearly alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def mixtral_config(tiny_config) -> MixtralConfig:
    """Return a `text_config` of a mixture of experts with the tiny model's sizes."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(tiny_config().text_config, name) for name in sizes}
    return MixtralConfig(**shared, num_local_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="session")
def tiny_images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 20, 24, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


@pytest.fixture(scope="session")
def emoji_parquet(tmp_path_factory) -> Path:
    """Return a parquet file with the columns `image` and `name`: 24 emoji of 64x64 pixels."""
    file = tmp_path_factory.mktemp("emoji") / "images.parquet"
    import_example("draw_emoji.py").draw("google", 64, 24).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory):
    """Return a function that makes the real tokenizer, from the package `llama-models`, without image tokens."""
    from importlib.resources import files

    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = ["<|begin_of_text|>", "<|end_of_text|>", *[f"<|reserved_special_token_{n}|>" for n in (0, 1, 2, 3)]]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{n}|>" for n in range(5, 251)]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    file = files("llama_models") / "llama3" / "tokenizer.model"
    converter = TikTokenConverter(str(file), pattern=pattern, extra_special_tokens=names)
    tokenizer = converter.converted()
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    return lambda: PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )


@pytest.fixture(scope="session")
def llama3_processor(llama3_tokenizer, golden_image_processor) -> MetaMorphProcessor:
    """Return a processor with the released code's chat format and 4 visual tokens per image."""
    return build_processor(llama3_tokenizer(), golden_image_processor, MetaMorphConfig(num_image_tokens=4))


@pytest.fixture
def components(tiny_model, tiny_processor):
    """Return all components of a pipeline: 4 visual tokens 16 wide, 4x4 latents, 8x8 pixels."""
    model = tiny_model()
    torch.manual_seed(0)
    projector = VisualTokenProjector(
        visual_token_dim=16, cross_attention_dim=8, hidden_dim=12, num_image_tokens=4, sequence_length=6
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=3,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=0.7,
    )
    return {
        "model": model,
        "processor": tiny_processor,
        "projector": projector.eval(),
        "unet": unet.eval(),
        "vae": vae.eval(),
        "scheduler": DDIMScheduler(clip_sample=False),
    }


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Return a folder with ten images, each in its own shade of gray."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        Image.new("RGB", (20, 16), (25 * number,) * 3).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> Path:
    """Return a video of ten seconds that gets brighter: 10 frames a second in the first half, then 2."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    times = [*np.arange(0, 5, 0.1), *np.arange(5, 10, 0.5)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time in times:
            grey = np.full((32, 32, 3), round(20 + 20 * time), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def row(pictures, video):
    """Return a function that makes a row of a family with existing paths."""

    def make(family: str) -> dict:
        made = {k: str(pictures / v) if str(v).endswith(".png") else v for k, v in ROWS[family].items()}
        return made | ({"video": str(video)} if family.startswith("video") else {})

    return make
