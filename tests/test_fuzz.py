"""Odd input at every door ends in a result or in a refusal that names what is wrong.

Each case is drawn by a seed of its own, so that a fault can be repeated by its number.
"""

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EXAMPLES, ROWS
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from metamorph_hf import MetaMorphConfig, MetaMorphPipeline
from metamorph_hf.data.formats import FAMILIES, BadSample
from metamorph_hf.vpit.collator import DataCollatorForVPiT


sys.path.append(str(Path(__file__).parents[1] / "conversion"))
from common import ConversionError  # noqa: E402
from convert_metamorph_to_hf import convert_config  # noqa: E402


ODD_VALUES = [None, True, 0, -1, 1, 3, 2.5, float("nan"), float("inf"), 10**20, "", " ", "x", "3", "<image>", "\ud83d"]
ODD_VALUES += [b"", b"x", [], [None], [[]], ["x"], [3], [1, 2, 3, 4], (), {}, {"a": 1}, {"type": []}, {"path": 3}]
ODD_VALUES += [{"type": "image"}, {"type": "text", "text": None}, {"role": "user"}, {"bytes": None, "path": None}]
ODD_VALUES += [{"from": [], "value": "x"}, {"url": 3}, {3}, object(), int, Path("/no/such"), "../1.png", "a\0b"]
ODD_VALUES += [np.zeros(3), np.array(2), torch.zeros(0), torch.full((4, 16), torch.nan), torch.ones(2, 4, 16), 1 + 2j]
ODD_VALUES += [Image.new("L", (1, 1)), "{{ x }}", "\x00", "http://127.0.0.1:9/1", "data:image/png;base64,AAAA"]

# A message with one of these comes from inside and says nothing about the input.
INTERNAL = (
    "object has no",
    "object is not",
    "object does not",
    "is not iterable",
    "unsupported operand",
    "not supported between",
    "an integer is required",
    "cannot be interpreted",
    "object cannot be",
    "unhashable type",
    "must be real number",
    "bad operand",
    "truth value",
    "can only concatenate",
    "indices must be",
    "unpack",
    "shape mismatch",
    "Boolean value of",
    "cannot convert",
    "could not convert",
    "max() ",
    "min() ",
    "not a mapping",
    "must be a mapping",
    "'NoneType' object",
)


def mutate(value: Any, rng: random.Random) -> Any:
    """Return a copy in which one part, at any depth, is replaced, left out or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.05:
            return {**value, rng.choice(["type", "role", "content", "image", 3]): rng.choice(ODD_VALUES)}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index, choice = rng.randrange(len(value)), rng.random()
        if choice < 0.2:
            return value[:index] + value[index + 1 :] if choice < 0.1 else value[:index] + value[index:] * 2
        return [*value[:index], mutate(value[index], rng), *value[index + 1 :]]
    return rng.choice(ODD_VALUES)


def change_options(rng: random.Random, names: list[str], values: list = ODD_VALUES) -> dict[str, Any]:
    return {rng.choice(names): rng.choice(values) for _ in range(rng.choice([1, 1, 2]))}


def find_faults(count: int, draw: Callable[[random.Random], tuple[Any, Callable, tuple[str, ...]]]) -> str:
    """Run `count` cases, and describe those that end in an exception that names nothing.

    `draw` returns the case, a function that runs it, and words, one of which a refusal's message must have.
    """
    faults = []
    for number in range(count):
        case, run, words = draw(random.Random(number))
        try:
            run()
        except (ValueError, TypeError, FileNotFoundError, ConversionError, StrictDataclassError) as refusal:
            message = str(refusal)
            is_named = any(word.lower() in message.lower() for word in words)
            if is_named and not any(phrase in message.partition(": ")[0] for phrase in INTERNAL):
                continue
            faults.append(f"{number}: {case!r:.300} -> {type(refusal).__name__}: {message:.200}")
        except Exception as error:
            faults.append(f"{number}: {case!r:.300} -> {type(error).__name__}: {error!s:.200}")
    return f"{len(faults)} of {count}\n" + "\n".join(faults[:10]) if faults else ""


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4))}, {"type": "text", "text": "a"}]},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "b"}, {"type": "image", "image": Image.new("L", (3, 5))}],
    },
    {"role": "user", "content": "c"},
]


def test_chat_template(tiny_processor):
    def draw(rng):
        batch, tokenizes = rng.random() < 0.3, rng.random() < 0.8
        case = mutate([CONVERSATION, CONVERSATION[:2]] if batch else CONVERSATION, rng)
        case = mutate(case, rng) if rng.random() < 0.3 else case
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"} if tokenizes else {}
        padding = {"processor_kwargs": {"padding": True}} if tokenizes else {}
        words = ("conversation", "message", "content", "image", "role", "text")
        return case, lambda: tiny_processor.apply_chat_template(case, tokenize=tokenizes, **options, **padding), words

    assert not (faults := find_faults(600, draw)), faults


@pytest.fixture(scope="module")
def image_files() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    files = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        files[kind] = file.getvalue()
    return files


def damage(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 10])):
        index, choice = rng.randrange(len(data)), rng.random()
        if choice < 0.2:
            data = data[: max(index, 1)]
        elif choice < 0.8:
            data[index if rng.random() < 0.5 else index % 64 % len(data)] = rng.randrange(256)
        else:
            data[index:index] = rng.randbytes(4)
    return bytes(data)


def test_damaged_image_files(tiny_processor, image_files, tmp_path):
    def draw(rng):
        kind = rng.choice(list(image_files))
        path = tmp_path / f"broken.{kind.lower()}"
        path.write_bytes(damage(image_files[kind], rng))
        image, words = rng.choice([(path, (path.name,)), (str(path), (path.name,)), (path.read_bytes(), ("bytes",))])
        if rng.random() < 0.2:
            image = mutate({"bytes": path.read_bytes(), "path": str(path)}, rng)
            words = ("cannot be read (", "images")
        return image, lambda: tiny_processor(images=image, text="<image>", return_tensors="pt"), words

    assert not (faults := find_faults(400, draw)), faults


GENERATION_OPTIONS = ["max_new_tokens", "min_new_tokens", "max_length", "min_length", "max_time", "do_sample"]
GENERATION_OPTIONS += ["num_beams", "use_cache", "temperature", "top_k", "top_p", "min_p", "typical_p"]
GENERATION_OPTIONS += ["repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "max_images"]
GENERATION_OPTIONS += ["force_image", "num_return_sequences", "pad_token_id", "eos_token_id", "output_scores"]
GENERATION_OPTIONS += ["return_dict_in_generate", "guidance_scale", "epsilon_cutoff", "eta_cutoff", "length_penalty"]
GENERATION_OPTIONS += ["begin_suppress_tokens", "sequence_bias", "cache_implementation", "stop_strings"]
GENERATION_INPUTS = ["input_ids", "attention_mask", "pixel_values", "visual_tokens", "image_indices", "position_ids"]
GENERATION_INPUTS += ["inputs_embeds", "generation_config", "streamer", "logits_processor", "stopping_criteria"]
GENERATION_INPUTS += ["mm_encoder_outputs", "cache", "generation_mode", "unknown_option"]


def test_generate(tiny_model, tiny_processor):
    model = tiny_model()
    images = [Image.new("RGB", (4, 4))]
    inputs = tiny_processor(images=images, text="<image>ab", return_tensors="pt")

    def stop(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] > 16)

    tensors = [None, torch.zeros(0), torch.zeros(1, 0, dtype=torch.long), torch.tensor([[-1, 3]]), torch.ones(1, 9)]
    tensors += [torch.full((1, 4, 16), torch.nan), torch.zeros(2, 4, 16), torch.tensor([[10**6]]), torch.tensor([5])]

    def draw(rng):
        options = change_options(rng, GENERATION_OPTIONS + GENERATION_INPUTS)
        for name in set(options) & set(GENERATION_INPUTS):
            options[name] = rng.choice([*tensors, *ODD_VALUES, inputs.get(name)])
        words = ("input", "image", "penalty", "stop string", *options)
        options = {"max_new_tokens": 7, **inputs, "stopping_criteria": [stop], **options}
        return {n: v for n, v in options.items() if v is not inputs.get(n)}, lambda: model.generate(**options), words

    assert not (faults := find_faults(600, draw)), faults


def test_pipeline(components):
    pipe = MetaMorphPipeline(**components, default_num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    decoding = ["num_inference_steps", "timesteps", "sigmas", "guidance_scale", "num_images_per_prompt", "height"]
    decoding += ["width", "latents", "negative_visual_tokens", "eta", "generator", "cross_attention_kwargs"]
    decoding += ["output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs"]
    calling = [*decoding, "prompt", "image", "messages", "max_new_tokens", "generation_kwargs"]
    tokens, image = torch.ones(1, 4, 16), Image.new("RGB", (4, 4))

    def draw(rng):
        door = rng.choice(["call", "decode", "reconstruct"])
        if door == "call":
            options = change_options(rng, calling)
            if options.get("callback_on_step_end") is int:  # a function, though not a callback
                options.pop("callback_on_step_end")
            defaults = {"prompt": "a", "max_new_tokens": 8, "generation_kwargs": {"force_image": True}}
            words = ("model_kwargs", *options)
            return (door, options), lambda: pipe(**{**defaults, **options}), words
        if door == "decode":
            options = change_options(rng, ["visual_tokens", *decoding])
            if options.get("callback_on_step_end") is int:
                options.pop("callback_on_step_end")
            decoded = {"visual_tokens": tokens, **options}
            return (door, options), lambda: pipe.decode_visual_tokens(**decoded), tuple(options)
        options = change_options(rng, ["images", *decoding])
        return (door, options), lambda: pipe.reconstruct(**{"images": image, **options}), ("image", *options)

    assert not (faults := find_faults(300, draw)), faults


def test_families(row):
    rows = {family: row(family) for family in ROWS}

    def draw(rng):
        family = rng.choice(list(FAMILIES))
        changed = mutate({**rows[family], "tools": None}, rng)
        changed = changed if isinstance(changed, dict) else rows[family]
        if rng.random() < 0.3:
            changed = {**changed, **change_options(rng, ["video", "images", "image", "names", "tools", "boxes"])}
        options = {"show": "boxes"} if family == "visual_thinking" and rng.random() < 0.5 else {}

        def run():
            try:
                record = FAMILIES[family](changed, random.Random(0), **options)
            except BadSample as refusal:
                assert str(refusal)
            else:
                assert isinstance(record["messages"], list) and isinstance(record["images"], list)

        return (family, changed), run, ()

    assert not (faults := find_faults(800, draw)), faults


def test_collator(tiny_processor):
    def draw(rng):
        examples = mutate([rng.choice(EXAMPLES)], rng)
        examples = mutate(examples, rng) if rng.random() < 0.3 else examples
        examples = examples if isinstance(examples, list) else [examples]
        options = {
            "max_length": rng.choice([None, 8, 40]),
            "on_bad_sample": rng.choice(["raise", "skip"]),
            "on_too_long": rng.choice(["refuse", "drop_turns"]),
        }
        return (examples, options), lambda: DataCollatorForVPiT(tiny_processor, **options)(examples), ("example",)

    assert not (faults := find_faults(800, draw)), faults


RELEASED = {
    "model_type": "metamorph_llama",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": True,
    "image_token_reduction": "interpolation",
    "vocab_size": 128258,
    "normalize_vision": True,
    "vision_head_type": "mlp",
    "mm_projector_type": "mlp2x_gelu",
    "num_image_tokens": 64,
    "vision_coef": 1.0,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 500000.0,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "eos_token_id": [1, 2],
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_configurations(tiny_config):
    ours = {**tiny_config().to_dict()}
    own = [name for name in MetaMorphConfig.__annotations__ if name in ours]

    def draw(rng):
        if rng.random() < 0.5:
            case = mutate(RELEASED, rng)
            case = case if isinstance(case, dict) else RELEASED
            changed = tuple(str(name) for name in {*case, *RELEASED} if case.get(name) is not RELEASED.get(name))
            return (
                case,
                lambda: convert_config(case, None),
                ("config", "for field", "hidden size", "projector_type", *changed),
            )
        name = rng.choice(own)
        value = mutate(ours[name], rng) if isinstance(ours[name], dict) else rng.choice(ODD_VALUES)
        return {name: value}, lambda: MetaMorphConfig(**{**ours, name: value}), (name, "config", "for field")

    assert not (faults := find_faults(600, draw)), faults
