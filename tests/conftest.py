"""Small real objects for every test: the released implementation's golden numbers, and a tiny model of our own."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE


GOLDEN = Path(__file__).parent / "golden"
PLACEHOLDER = 224  # the released code has -200 in the ids and 224 rows; ours is one id more
RELEASED_KEYS = {  # prefix in the released checkpoint -> in ours
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.": "model.projector.",
    "model.": "model.language_model.",
    "vision_head.": "vision_head.",
    "lm_head.": "lm_head.",
}


def released_to_ours(key: str) -> str:
    if key in ("vision_head.weight", "vision_head.bias"):  # a head of one layer is no Sequential there
        return key.replace("vision_head.", "vision_head.0.")
    prefix = next(prefix for prefix in RELEASED_KEYS if key.startswith(prefix))
    return RELEASED_KEYS[prefix] + key.removeprefix(prefix)


@dataclass
class Golden:
    """What the released implementation gave: `tensors` by name, `facts` (golden.json), the four `images`."""

    tensors: dict[str, torch.Tensor]
    facts: dict
    images: dict[str, Image.Image]
    weights: dict[str, torch.Tensor]

    def build_model(self, **config) -> MetaMorphForConditionalGeneration:
        """The released weights in our model; `config` overrides. A head of another shape needs weights of its own."""
        text_config = LlamaConfig(
            vocab_size=PLACEHOLDER + 1,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            bos_token_id=208,
            eos_token_id=[209, 217],
            pad_token_id=209,
        )
        vision_config = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=42,
            patch_size=7,
        )
        defaults = {
            "text_config": text_config,
            "vision_config": vision_config,
            "image_token_id": PLACEHOLDER,
            "image_start_token_id": 222,
            "image_end_token_id": 223,
            "num_image_tokens": 16,
        }
        model = MetaMorphForConditionalGeneration(MetaMorphConfig(**{**defaults, **config})).eval()
        # `vision_proj` is dead in the released code; the row of our placeholder id is new.
        weights = {released_to_ours(key): value for key, value in self.weights.items() if "vision_proj" not in key}
        for key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            weights[key] = torch.cat([weights[key], torch.zeros(1, 48)])
        own_head = model.config.vision_head_type != "mlp"
        if own_head:
            weights = {key: value for key, value in weights.items() if not key.startswith("vision_head.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(own_head and key.startswith("vision_head.") for key in missing)
        return model


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(
        tensors=load_file(GOLDEN / "golden.safetensors"),
        facts=json.loads((GOLDEN / "golden.json").read_text()),
        images={path.stem: Image.open(path).convert("RGB") for path in sorted((GOLDEN / "images").glob("*.png"))},
        weights=load_file(GOLDEN / "model.safetensors"),
    )


@pytest.fixture(scope="session")
def golden_model(golden) -> MetaMorphForConditionalGeneration:
    """The released weights in our model. Leave its weights and its configuration as they are."""
    return golden.build_model()


@pytest.fixture(scope="session")
def golden_image_processor():
    return AutoImageProcessor.from_pretrained(GOLDEN, backend="pil")


SPECIAL_TOKENS = ("<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<image_start>", "<image_end>")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer) -> MetaMorphProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=True)
    return MetaMorphProcessor(image_processor, tiny_tokenizer, num_image_tokens=4, chat_template=DEFAULT_CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """Makes a tiny configuration; keyword arguments override."""

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
    """Makes a fresh tiny model with seeded random weights, in eval mode; keyword arguments override its config."""

    def make(**config) -> MetaMorphForConditionalGeneration:
        torch.manual_seed(0)
        model = MetaMorphForConditionalGeneration(tiny_config(**config)).eval()
        for parameter in model.parameters():  # at initialisation's 0.02 all outputs are nearly alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 20, 24, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(picture.numpy()) for picture in pixels]
