"""What the conversion scripts share: weights read tensor by tensor, a folder written whole or not at all, a table."""

import errno
import json
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from chat_formats import METAMORPH_TOKENS
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration
from metamorph_hf.model_cards import create_model_card


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ConversionError(Exception):
    """A sentence for the person who runs the script."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; what went wrong is printed as a sentence, with a non-zero exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, it takes temporary folders along
    try:
        main()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit(f"error: The disk is full ({error}). Nothing was left behind; make room and run this again.")
        sys.exit(f"error: {error}")
    except SafetensorError as error:
        sys.exit(
            f"error: A safetensors file could not be read or written (cut off, damaged, or the disk full): {error}"
        )
    except (ConversionError, ValueError, RuntimeError, ImportError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


def check_target(target: Path, *sources: str | Path | None) -> None:
    """Before any work: the target must not exist, nor lie inside one of the sources."""
    if target.exists():
        raise ConversionError(f"{target} exists already: name a folder that does not, or remove it first.")
    for source in sources:
        if source is not None and Path(source).is_dir() and target.resolve().is_relative_to(Path(source).resolve()):
            raise ConversionError(f"{target} lies inside {source}: name a folder beside it.")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that gets its name at the end, or vanishes if anything fails before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's folders are for their owner alone
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_pointer(path: Path) -> None:
    """What a clone without Git LFS holds in place of a large file."""
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ConversionError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there.")


def load_pickle(path: Path) -> dict:
    """A `torch.save`d dictionary of tensors and plain values, its tensors left on disk where the format allows."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist.")
    refuse_pointer(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds more than tensors, and unpickling such a file can run any code: it is refused. Save it "
            f"again as a plain state dict or as safetensors. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ConversionError(f"{path} cannot be read, it is cut off or damaged: {error}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, but must hold a dictionary.")
    return loaded


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A pickle of nothing but named tensors."""
    loaded = load_pickle(path)
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"{path} holds {name}, which is a {type(tensor).__name__} and no tensor: it is no plain state dict."
            )
    return loaded


class Weights:
    """The weights of a checkpoint folder, in safetensors or pickles, in one file or in shards.

    Args:
        folder (`Path`): Where `model.safetensors`, `pytorch_model.bin` or one of their indices lies.

    Attributes:
        shapes (`dict[Path, dict[str, tuple[int, ...]]]`): Per file, the tensors in it and their shapes.

    Raises:
        ConversionError: if there are no weights, a shard is missing or damaged, or an index and its shards differ.
    """

    @staticmethod
    def in_folder(folder: Path) -> bool:
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        return any((folder / name).is_file() for name in names)

    def __init__(self, folder: Path):
        self.shapes: dict[Path, dict[str, tuple[int, ...]]] = {}
        for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            if (folder / index_name).is_file():
                weight_map = required(read_json(folder / index_name), "weight_map", dict, index_name)
                files = sorted({folder / file for file in weight_map.values()})
                break
            if (folder / name).is_file():
                weight_map, files = None, [folder / name]
                break
        else:
            raise ConversionError(
                f"{folder} has no weights: expected {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME}, or one of their indices."
            )
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConversionError(
                f"{folder} lacks {', '.join(missing)}, which {index_name} names: copy the rest of it."
            )
        for file in files:
            self.shapes[file] = self._read_shapes(file)
        held = [name for shapes in self.shapes.values() for name in shapes]
        if weight_map is not None and set(held) != set(weight_map):
            differing = sorted(set(held) ^ set(weight_map))
            raise ConversionError(
                f"{index_name} and the shards beside it differ in {len(differing)} tensors, e.g. {differing[0]}."
            )
        if len(held) != len(set(held)):
            raise ConversionError(f"A tensor of {folder} stands in two of its shards.")

    @staticmethod
    def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix != ".safetensors":
            return {name: tuple(tensor.shape) for name, tensor in load_state_dict(file).items()}
        refuse_pointer(file)
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise ConversionError(f"{file} cannot be read, it is cut off or damaged: {error}") from error

    @property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for shapes in self.shapes.values() for name, shape in shapes.items()}

    def tensors(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one file, each read when it is asked for and checked for NaN and infinity."""
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    yield name, self.checked(name, opened.get_tensor(name), file)
        else:
            for name, tensor in load_state_dict(file).items():
                yield name, self.checked(name, tensor, file)

    @staticmethod
    def checked(name: str, tensor: torch.Tensor, file: Path) -> torch.Tensor:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConversionError(f"{name} in {file} holds NaN or infinity: this checkpoint is broken.")
        return tensor


def read_json(path: Path) -> dict:
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, but must hold an object of names and values.")
    return loaded


def required(source: dict, name: str, kind: type, file: str):
    """`source[name]`, which must be there and of this kind."""
    if name not in source:
        raise ConversionError(f"{file} does not say {name}, which decides what the weights mean: add it.")
    if type(source[name]) is not kind:
        raise ConversionError(f"{file} says {name} = {source[name]!r}, but it must be a {kind.__name__}.")
    return source[name]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """For a processor: padding on the left, as generation needs, and what the chat format is made of.

    Raises:
        ConversionError: if the tokenizer lacks tokens that it needs.
    """
    if chat_format == "metamorph":
        unknown = [token for token in METAMORPH_TOKENS if token not in tokenizer.get_vocab()]
        if unknown or tokenizer.bos_token is None:
            raise ConversionError(
                f"The chat format metamorph is made of Llama 3's tokens, but this tokenizer lacks "
                f"{', '.join(unknown) or 'a BOS token'}."
            )
    if tokenizer.eos_token is None:
        raise ConversionError("This tokenizer has no EOS token, so no answer would ever end.")
    if tokenizer.pad_token is None:
        known = "<|end_of_text|>" in tokenizer.get_vocab()  # what the released code pads with
        tokenizer.pad_token = "<|end_of_text|>" if known else tokenizer.eos_token
    tokenizer.padding_side = "left"


def load_whole(model_class, name: str, **kwargs) -> PreTrainedModel:
    """`model_class.from_pretrained`, but without random weights where the source has none, or NaN.

    Raises:
        ConversionError: if a tensor other than those of a pooling head is missing or broken.
    """
    model, info = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    if missing := sorted(k for k in info["missing_keys"] if "pooler" not in k and not k.startswith("head.")):
        raise ConversionError(f"{name} lacks {len(missing)} tensors of a {type(model).__name__}, e.g. {missing[0]}.")
    for key, tensor in model.state_dict().items():
        Weights.checked(key, tensor, Path(name))
    return model


def empty_model(config: MetaMorphConfig) -> MetaMorphForConditionalGeneration:
    """The model without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return MetaMorphForConditionalGeneration(config)


def write_shards(folder: Path, shards: Iterator[dict[str, torch.Tensor]], count: int, desc: str) -> None:
    """Write `count` shards and, if there are several, their index.

    Only one shard is in memory at a time.
    """
    weight_map, total = {}, 0
    for number, tensors in enumerate(tqdm(shards, desc=desc, total=count, unit="shard"), start=1):
        file = SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ConversionError(f"{file} could not be written, is the disk full? {error}") from error
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))


def save_description(model: PreTrainedModel, folder: Path, dtype: torch.dtype, name: str) -> None:
    """Configuration, generation defaults, model card and the code that `trust_remote_code` needs, beside weights."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    create_model_card(model.config, name).save(folder / "README.md")
    if not model.generation_config.do_sample:  # set all the same in older files, and not saved by newer libraries
        model.generation_config.update(temperature=None, top_p=None, top_k=None, typical_p=None)
    model.generation_config.save_pretrained(folder)


def check_forward(folder: Path, on_disk: bool) -> str:
    """Load a finished model through `AutoModel` and run an image and two tokens through it. Returns what was seen.

    Args:
        on_disk (`bool`):
            Leave the weights there until a layer needs them, so that the check takes no more memory than writing them
            did. Not every vision encoder of transformers can do that; SigLIP can.

    Raises:
        ConversionError: if an output is not finite.
    """
    with tempfile.TemporaryDirectory() as offload_folder:
        placement = {"device_map": {"": "disk"}, "offload_folder": offload_folder} if on_disk else {}
        model = AutoModel.from_pretrained(folder, dtype="auto", **placement)
        config, side = model.config, model.config.vision_config.image_size
        image = [config.image_token_id] * config.num_image_tokens
        ids = torch.tensor([[config.image_start_token_id, *image, config.image_end_token_id]])
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=torch.zeros(1, 3, side, side, dtype=model.dtype))
    if not (torch.isfinite(output.logits).all() and torch.isfinite(output.next_visual_token).all()):
        raise ConversionError(f"The converted model in {folder} gives NaN or infinity for a grey picture.")
    return f"logits {tuple(output.logits.shape)}, next visual token {tuple(output.next_visual_token.shape)}"


def print_table(rows: dict[str, object]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def size_of(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:,.1f} MB"
