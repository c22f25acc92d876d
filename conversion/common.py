"""Shared by the conversion scripts: reading weights, writing a folder whole or not at all, and sentences as errors."""

import json
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from chat_formats import METAMORPH_TOKENS
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from metamorph_hf import MetaMorphConfig, MetaMorphProcessor
from metamorph_hf.model_cards import create_model_card


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Names of the ids in the configuration, and the tokens, in the order in which they are added.
IMAGE_TOKENS = dict(image_start_token_id="<image_start>", image_end_token_id="<image_end>", image_token_id="<image>")
WEIGHT_FILES = [file + index for file in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]


class ConversionError(Exception):
    """An error whose message is a sentence for the person who runs the script."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; print what goes wrong as a sentence and exit with 1."""
    logging.set_verbosity_error()  # The scripts report missing and unused weights themselves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # As an exception, it removes temporary folders.
    try:
        main()
    except SafetensorError as error:
        sys.exit(f"error: A safetensors file is damaged or a Git LFS pointer, or the disk is full: {error}")
    except (ConversionError, ValueError, RuntimeError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # Libraries check few of the values.
        sys.exit(f"error: A file of the source holds a value that cannot be used: {error!r}.")


def check_target(target: Path, *sources: str | Path | None) -> None:
    """Check that the target does not exist and does not lie inside one of the sources."""
    if target.exists():
        raise ConversionError(f"{target} exists already: name a new folder, or remove this one first.")
    for source in sources:
        if source is not None and Path(source).is_dir() and target.resolve().is_relative_to(Path(source).resolve()):
            raise ConversionError(f"{target} lies inside {source}: name a folder beside it.")


@contextmanager
def write_folder(target: Path, table: dict[str, object]) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` at the end, or is removed if anything fails; print the table."""
    folder = target.with_name(f".{target.name}.unfinished")
    if folder.exists():
        print(f"Removing {folder}, which an interrupted conversion left behind.")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    for name, value in {**table, "target": f"{target}, {size / 1e6:,.1f} MB"}.items():
        print(f"{name:<{max(map(len, table))}}  {value}")


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object, in any Unicode encoding."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")
    try:
        loaded = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON, it may be cut off: {error}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, but must hold an object of names and values.")
    return loaded


def require_value(source: dict, name: str, kind: type, file: str | Path):
    """Return `source[name]`, which must be there and be of this type."""
    if name not in source:
        raise ConversionError(f"{file} does not say {name}, which decides what the weights mean: add it.")
    if type(source[name]) is not kind:
        raise ConversionError(f"{file} says {name} = {source[name]!r}, but it must be of type {kind.__name__}.")
    return source[name]


def read_file(path: Path) -> object:
    """Read a safetensors file or one that `torch.save` wrote, without running code from it."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ConversionError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there.")
    try:
        is_pickle = path.suffix != ".safetensors"
        return torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path} holds more than tensors and could run code: save only its tensors.") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ConversionError(f"{path} cannot be read, it is cut off or damaged: {error}") from error


def check_tensors(weights: object, source: str | Path) -> dict[str, torch.Tensor]:
    """Check that `weights` is a dictionary of named tensors without NaN and infinity, and return it."""
    if not isinstance(weights, dict):
        raise ConversionError(f"{source} holds a {type(weights).__name__}, but must hold a dictionary of tensors.")
    for name, tensor in weights.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ConversionError(f"{source} holds {name!r}, a {type(tensor).__name__}, but must hold named tensors.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConversionError(f"{name} in {source} holds NaN or infinity: this checkpoint is broken.")
    return weights


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint folder: safetensors or pickles, in one file or in shards."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), folder / WEIGHT_FILES[0])
    if path.suffix != ".json":
        return check_tensors(read_file(path), path)
    weights, weight_map = {}, require_value(read_json(path), "weight_map", dict, path)
    for file in sorted({str(file) for file in weight_map.values()}):
        weights |= check_tensors(read_file(folder / file), folder / file)
    if differing := sorted(weights.keys() ^ weight_map.keys()):
        raise ConversionError(f"{path} and its shards differ in {len(differing)} tensors, e.g. {differing[0]}.")
    return weights


def rename_key(name: str, table: dict[str, str]) -> str:
    """Apply the regular expressions of `table` (pattern to replacement) to the name of a weight, in order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def check_keys(source: str | Path, info: dict) -> None:
    """Raise a sentence for the first problem in the loading info of `from_pretrained`."""
    if names := sorted(info["missing_keys"]):
        raise ConversionError(f"{source} lacks tensors that the model needs: {len(names)}, e.g. {names[0]}.")
    if names := sorted(info["unexpected_keys"]):
        raise ConversionError(f"{source} holds tensors that the model does not have: {len(names)}, e.g. {names[0]}.")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ConversionError(f"{source} holds {name} of shape {(*found,)}, but {(*expected,)} was expected.")


def load_exactly(module: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load weights into a module that must have the same names and shapes."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        mismatches = " ".join(str(error).split())[:300]  # The first of the names, which are many if one does not fit.
        raise ConversionError(f"{source} does not fit its configuration: {mismatches}") from error


def load_complete(model_class, name: str | Path, **kwargs) -> PreTrainedModel:
    """Load a model by `from_pretrained` that must not get random weights, other than those of a pooling head."""
    model, info = model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    missing = [key for key in info["missing_keys"] if "pooler" not in key and not key.startswith("head.")]
    check_keys(name, {**info, "missing_keys": missing, "unexpected_keys": ()})
    check_tensors(model.state_dict(), name)
    return model


def load_tower_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a vision tower, or that of the vision tower inside a larger model."""
    config = AutoConfig.from_pretrained(name)
    config = config.vision_config if "vision_config" in config.sub_configs else config
    config.name_or_path = name
    return config


def load_metamorph(name: str | Path, dtype="auto") -> tuple[PreTrainedModel, MetaMorphProcessor | None]:
    """Load a MetaMorph and, if it has one, its processor."""
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, MetaMorphConfig):
        raise ConversionError(f"{name} is a {config.model_type}, but must be a MetaMorph.")
    model = load_complete(AutoModel, name, dtype=dtype)
    if cached_file(name, "processor_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return model, None
    processor = AutoProcessor.from_pretrained(name)
    processor.check_config(config)
    return model, processor


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """Check that a tokenizer has the tokens of its chat format, and make it pad on the left, as generation needs."""
    vocabulary = tokenizer.get_vocab()
    missing = [] if tokenizer.eos_token else ["an EOS token"]
    if chat_format == "metamorph":
        missing += [token for token in METAMORPH_TOKENS if token not in vocabulary]
        missing += [] if tokenizer.bos_token else ["a BOS token"]
    if missing:
        raise ConversionError(f"For the chat format {chat_format} the tokenizer lacks {', '.join(missing)}.")
    if tokenizer.pad_token is None:  # The released code pads with <|end_of_text|>.
        tokenizer.pad_token = "<|end_of_text|>" if "<|end_of_text|>" in vocabulary else tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # Saved are the `init_kwargs` only.


def save_model(model: PreTrainedModel, processor: MetaMorphProcessor | None, target: Path, table: dict) -> None:
    """Write a model (which loses its weights, to save memory), its card and its processor, and check the folder."""
    if not model.generation_config.do_sample:  # Older files set sampling options that are refused without sampling.
        model.generation_config.update(temperature=None, top_p=None, top_k=None, typical_p=None)
    with write_folder(target, table) as folder:
        model.save_pretrained(folder)
        create_model_card(model.config, target.name).save(folder / "README.md")
        if processor is not None:
            processor.save_pretrained(folder)
        model.to("meta")
        table["loaded again"] = check_model(folder)


def check_model(folder: Path) -> str:
    """Load a model, run an image through it, and return the shapes of its output."""
    model, processor = load_metamorph(folder)
    config, side = model.config, model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side)
    if processor is not None:
        pixels = processor.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values
    if pixels.shape[-2] != pixels.shape[-1]:
        raise ConversionError("The image processor makes images that are not square: choose another one.")
    ids = [config.image_start_token_id, *[config.image_token_id] * config.num_image_tokens, config.image_end_token_id]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
    if not (torch.isfinite(output.logits).all() and torch.isfinite(output.next_visual_token).all()):
        raise ConversionError("The converted model gives NaN or infinity for a black image.")
    return f"logits {tuple(output.logits.shape)}, next visual token {tuple(output.next_visual_token.shape)}"
