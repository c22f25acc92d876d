"""Convert a checkpoint of the released MetaMorph code (facebookresearch/metamorph) to this package's layout.

    python conversion/convert_metamorph_to_hf.py SRC DST --tokenizer meta-llama/Llama-3.1-8B-Instruct

SRC is a folder with `config.json` and the weights: `model.safetensors`, `pytorch_model.bin`, or shards of either.
Without `--tokenizer` the tokenizer of SRC is taken; without one there either, DST gets no processor.

    python conversion/convert_metamorph_to_hf.py STAGE1/mm_projector.bin DST --base BASE

puts what stage 1 of the released code trained (the projector and the embeddings of the two image tokens) into a copy
of BASE, a MetaMorph folder, e.g. from init_from_pretrained.py.
"""

import argparse
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from chat_formats import METAMORPH_CHAT_TEMPLATE
from common import (
    DTYPES,
    ConversionError,
    Weights,
    check_forward,
    check_target,
    empty_model,
    load_state_dict,
    load_whole,
    prepare_tokenizer,
    print_table,
    read_json,
    required,
    run,
    save_description,
    size_of,
    whole_folder,
    write_shards,
)
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from metamorph_hf import MetaMorphConfig, MetaMorphProcessor


# Released name -> our name; the first pattern that matches a whole name decides. None: dead in the released code too.
KEY_TABLE = (
    (r"model\.vision_proj\..+", None),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?head\..+", None),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"model\.mm_projector\.(weight|bias)", r"model.projector.0.\1"),
    (r"model\.mm_projector\.(\d+\.(?:weight|bias))", r"model.projector.\1"),
    (r"vision_head\.(weight|bias)", r"vision_head.0.\1"),
    (r"vision_head\.(\d+\.(?:weight|bias))", r"vision_head.\1"),
    (r"lm_head\.weight", r"lm_head.weight"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
)
VOCABULARY_KEYS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
TOWER_PREFIX = "model.vision_tower."
# Number of attention heads by width: SigLIP base, large and so400m. The tensors do not tell it.
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}
RELEASED_HEAD_LAYERS = {"mlp": 2, "mlp2x_gelu": 3}  # any other name makes one layer


def our_name(name: str) -> str | None:
    """Our name of a released tensor; None for a dead one.

    Raises:
        ConversionError: if the name is unknown.
    """
    for pattern, replacement in KEY_TABLE:
        if match := re.fullmatch(pattern, name):
            return None if replacement is None else match.expand(replacement)
    raise ConversionError(
        f"The checkpoint holds {name}, which no checkpoint of the released code has: is it another model's, or of "
        "changed code?"
    )


def tower_config_from(shapes: dict[str, tuple[int, ...]]) -> SiglipVisionConfig:
    """The vision tower's shape from our names' tensor shapes."""
    patches = shapes.get(f"{TOWER_PREFIX}embeddings.patch_embedding.weight")
    if patches is None:
        raise ConversionError(
            "The checkpoint holds no vision tower: name the one it was trained with, --vision-tower P."
        )
    width, _, patch_size, _ = patches
    if width not in SIGLIP_HEADS:
        raise ConversionError(
            f"The vision tower is {width} wide, and its tensors do not tell its number of attention heads: name the "
            "tower it was trained with, --vision-tower P."
        )
    positions = shapes[f"{TOWER_PREFIX}embeddings.position_embedding.weight"][0]
    layers = {match[1] for name in shapes if (match := re.match(rf"{TOWER_PREFIX}encoder\.layers\.(\d+)\.", name))}
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{TOWER_PREFIX}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=SIGLIP_HEADS[width],
        image_size=math.isqrt(positions) * patch_size,
        patch_size=patch_size,
    )


def count_layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    count = sum(name.startswith(prefix) and name.endswith(".weight") for name in shapes)
    if not count:
        raise ConversionError(f"The checkpoint holds no {prefix}*.weight.")
    return count


def projector_type_from(source: dict, shapes: dict[str, tuple[int, ...]]) -> str:
    layers, named = count_layers(shapes, "model.projector."), source.get("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", named)
    expected = 1 if named == "linear" else int(match[1]) if match else None
    if expected != layers:
        raise ConversionError(
            f'config.json says mm_projector_type "{named}", but the checkpoint\'s has {layers} layers.'
        )
    return named


def vision_head_type_from(source: dict, shapes: dict[str, tuple[int, ...]], token_dim: int) -> str:
    layers, named = count_layers(shapes, "vision_head."), source.get("vision_head_type", "linear")
    if RELEASED_HEAD_LAYERS.get(named, 1) != layers:
        raise ConversionError(
            f'config.json says vision_head_type "{named}", but the checkpoint\'s has {layers} layers.'
        )
    width = shapes[f"vision_head.{2 * (layers - 1)}.weight"][0]
    if width != token_dim:
        reason = (
            'The released head "linear" gives the language model\'s width, so it never learned anything.'
            if named == "linear"
            else "Is this the right vision tower?"
        )
        raise ConversionError(f"The vision head gives {width} channels, but visual tokens have {token_dim}. {reason}")
    return named if layers > 1 else "linear"


def convert_config(source: dict, shapes: dict[str, tuple[int, ...]], tower: SiglipVisionConfig) -> MetaMorphConfig:
    """Our configuration.

    Args:
        source (`dict`): The released `config.json`.
        shapes (`dict`): Shapes by our names.
        tower (`SiglipVisionConfig`): The vision tower's configuration.

    Raises:
        ConversionError: if the checkpoint is no MetaMorph, uses what the released code could not run or never
            trained with, or its configuration and tensors disagree.
    """
    if source.get("model_type") not in ("metamorph_llama", "metamorph"):
        raise ConversionError(
            f"config.json says model_type {source.get('model_type')!r}, not 'metamorph_llama': this is no "
            "checkpoint of the released MetaMorph code."
        )
    wanted = {
        "mm_vision_select_layer": (-1,),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (True,),
        "image_token_reduction": ("interpolation", "concat_interpolation"),
    }
    for name, allowed in wanted.items():
        # The released defaults are others, so what is not said cannot be taken for granted.
        if (found := required(source, name, type(allowed[0]), "config.json")) not in allowed:
            reason = " (its layers were never trained in the released code)" if found == "mlpmixer" else ""
            raise ConversionError(
                f"config.json says {name} = {found!r}{reason}, but only "
                f"{' or '.join(map(repr, allowed))} can be converted."
            )
    if source.get("apply_softmax"):
        raise ConversionError("config.json says apply_softmax, a loss that cannot be converted.")
    known = {field.name for field in fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
    text = {
        name: value for name, value in source.items() if name in known and name not in ("model_type", "torch_dtype")
    }
    vocab_size = shapes[VOCABULARY_KEYS[0]][0]
    if required(source, "vocab_size", int, "config.json") != vocab_size:
        raise ConversionError(
            f"config.json says vocab_size {source['vocab_size']}, but the embeddings have {vocab_size} rows."
        )
    normalized = required(source, "normalize_vision", bool, "config.json")
    reduction = source["image_token_reduction"]
    token_dim = tower.hidden_size * (4 if reduction == "concat_interpolation" else 1)
    return MetaMorphConfig(
        text_config=LlamaConfig(
            **{**text, "vocab_size": vocab_size + 1}, name_or_path=source.get("_name_or_path", "")
        ),
        vision_config=tower,
        # The released code appends its two image tokens last, and marks images by -200; here that is one more id.
        image_start_token_id=vocab_size - 2,
        image_end_token_id=vocab_size - 1,
        image_token_id=vocab_size,
        num_image_tokens=required(source, "num_image_tokens", int, "config.json"),
        token_reduction=reduction,
        projector_type=projector_type_from(source, shapes),
        vision_head_type=vision_head_type_from(source, shapes, token_dim),
        normalize_visual_tokens=normalized,
        visual_loss_type="cosine" if normalized else "l1",  # what its "mse_loss_fn" computes
        visual_loss_weight=source.get("vision_coef", 1.0),
    )


def converted_shards(
    weights: Weights, names: dict[str, str | None], tower: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> Iterator[dict[str, torch.Tensor]]:
    """One dictionary per source file, and one for a vision tower from elsewhere."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous() if dtype is None else tensor.to(dtype).contiguous()

    for file in weights.shapes:
        shard = {}
        for name, tensor in weights.tensors(file):
            if (target := names.get(name)) is None:
                continue
            if target in VOCABULARY_KEYS:  # the placeholder's row is never read
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
            shard[target] = cast(tensor)
        if shard:
            yield shard
    if tower:
        yield {name: cast(tensor) for name, tensor in tower.items()}


def without_second_copy(weights: Weights, names: dict[str, str | None]) -> dict[str, str | None]:
    """`names` without `lm_head`, which pickles of tied models hold beside the embeddings.

    Raises:
        ConversionError: if it is another matrix than the embeddings.
    """
    if "lm_head.weight" not in names:
        return names
    pair = {}
    for file in weights.shapes:
        pair |= {name: tensor for name, tensor in weights.tensors(file) if names[name] in VOCABULARY_KEYS}
    if len({tuple(tensor.shape) for tensor in pair.values()}) != 1 or not torch.equal(*pair.values()):
        raise ConversionError("config.json says tie_word_embeddings, but lm_head.weight differs from the embeddings.")
    return {name: ours for name, ours in names.items() if name != "lm_head.weight"}


def build_processor(
    tokenizer: PreTrainedTokenizerBase, image_processor, config: MetaMorphConfig
) -> MetaMorphProcessor:
    """The processor with the released code's chat format.

    Raises:
        ConversionError: if the tokenizer's ids are not those of the checkpoint, or it is not Llama 3's.
    """
    tokens = {
        "<image_start>": config.image_start_token_id,
        "<image_end>": config.image_end_token_id,
        "<image>": config.image_token_id,
    }
    for token, wanted in tokens.items():
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ConversionError(
                f"In this tokenizer {token} has the id {found}, but in the checkpoint's vocabulary of "
                f"{config.image_token_id} rows it must be {wanted}: this is not the tokenizer it was trained with."
            )
    prepare_tokenizer(tokenizer, "metamorph")
    return MetaMorphProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=METAMORPH_CHAT_TEMPLATE,
    )


def convert(
    source: Path,
    target: Path,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert the checkpoint folder `source`; the arguments are those of the command line.

    Raises:
        ConversionError: if anything about the source is not as it must be, or `target` exists.
    """
    check_target(target, source, vision_tower, tokenizer)
    weights = Weights(source)
    source_config = read_json(source / "config.json")
    names = {name: our_name(name) for name in weights.all_shapes}
    if source_config.get("tie_word_embeddings"):
        names = without_second_copy(weights, names)
    shapes = {ours: weights.all_shapes[name] for name, ours in names.items() if ours is not None}

    tower_weights: dict[str, torch.Tensor] = {}
    if vision_tower is None:
        tower = tower_config_from(shapes)
    else:
        tower = AutoConfig.from_pretrained(vision_tower)
        tower = getattr(tower, "vision_config", tower)  # a SigLIP of two towers, or its vision tower alone
        if tower.model_type != "siglip_vision_model":
            raise ConversionError(f"{vision_tower} is a {tower.model_type}, but the released code knows SigLIP only.")
        if not any(name.startswith(TOWER_PREFIX) for name in shapes):
            loaded = load_whole(SiglipVisionModel, vision_tower, dtype="auto").state_dict()
            tower_weights = {TOWER_PREFIX + k: tensor for k, tensor in loaded.items() if not k.startswith("head.")}
            shapes |= {name: tuple(tensor.shape) for name, tensor in tower_weights.items()}
    tower.vision_use_head = False  # nobody reads what it pools
    tower.name_or_path = str(vision_tower or "")
    config = convert_config(source_config, shapes, tower)

    model = empty_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    for name in VOCABULARY_KEYS:
        if name in shapes:
            shapes[name] = (shapes[name][0] + 1, *shapes[name][1:])
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ConversionError(f"The checkpoint lacks {len(missing)} tensors that the model needs, e.g. {missing[0]}.")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise ConversionError(
            f"The checkpoint has {len(extra)} tensors that config.json has no place for, e.g. {extra[0]}."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            hint = " Is this the vision tower it was trained with?" if name.startswith(TOWER_PREFIX) else ""
            raise ConversionError(f"{name} has the shape {shapes[name]}, but {shape} was expected.{hint}")

    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    # The released code stops at either id of Llama 3's, whatever one file or the other says.
    stops = [model.generation_config.eos_token_id, config.text_config.eos_token_id]
    stops = {id for ids in stops if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    tokenizer_source = tokenizer or (source if (source / "tokenizer_config.json").is_file() else None)
    processor = None
    if tokenizer_source is not None:
        has_image_processor = vision_tower is not None and (
            not Path(vision_tower).is_dir() or (Path(vision_tower) / "preprocessor_config.json").is_file()
        )
        size = {"height": tower.image_size, "width": tower.image_size}
        processor = build_processor(
            AutoTokenizer.from_pretrained(tokenizer_source, config=config.text_config),
            AutoImageProcessor.from_pretrained(vision_tower, backend="pil")
            if has_image_processor
            else SiglipImageProcessorPil(size=size, do_convert_rgb=True),
            config,
        )
        pixels = processor.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values
        if pixels.shape[-2:] != (tower.image_size, tower.image_size):
            raise ConversionError(
                f"The image processor gives pictures of {tuple(pixels.shape[-2:])} pixels, but the vision tower sees "
                f"{tower.image_size}x{tower.image_size}: they do not belong together."
            )
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        vocabulary = processor.tokenizer.get_vocab()
        stops |= {vocabulary[token] for token in ("<|end_of_text|>", "<|eot_id|>") if token in vocabulary}
    if not stops:
        raise ConversionError(
            "Neither config.json nor generation_config.json names an eos_token_id: no answer would end."
        )
    model.generation_config.eos_token_id = sorted(stops)

    count = sum(any(names.get(name) for name in held) for held in weights.shapes.values()) + bool(tower_weights)
    saved_dtype = dtype or DTYPES[source_config.get("torch_dtype") or source_config.get("dtype") or "float32"]
    with whole_folder(target) as folder:
        write_shards(folder, converted_shards(weights, names, tower_weights, dtype), count, "Converting")
        save_description(model, folder, saved_dtype, target.name)
        if processor is not None:
            processor.save_pretrained(folder)
        seen = check_forward(folder, on_disk=True)
    dead = [name for name, ours in names.items() if ours is None]
    dead_modules = sorted({re.match(r".*?(?:vision_proj|\.head)(?=\.)", name)[0] for name in dead})
    print_table(
        {
            "tensors": len(expected),
            "parameters": f"{sum(math.prod(shape) for shape in expected.values()):,}",
            "dead tensors left out": f"{len(dead)} ({', '.join(dead_modules) or 'none'})",
            "vision tower": f"from {vision_tower}" if tower_weights else "the checkpoint's own",
            "image token ids": f"<image_start> {config.image_start_token_id}, <image_end> {config.image_end_token_id},"
            f" <image> {config.image_token_id}",
            "dtype": str(saved_dtype).removeprefix("torch."),
            "processor": "saved" if processor else "none: no tokenizer was found, give one with --tokenizer",
            "loaded again": seen,
            "target": f"{target}, {size_of(target)}",
        }
    )


def convert_stage1(source: Path, target: Path, base: Path, dtype: torch.dtype | None = None) -> None:
    """What stage 1 trained into a copy of the model in `base`.

    The released stage 2 takes from this file the projector and the last two embedding rows, nothing else.
    """
    check_target(target, base)
    trained = {our_name(name): tensor for name, tensor in load_state_dict(source).items()}
    for name, tensor in trained.items():
        Weights.checked(name, tensor, source)
    config = AutoConfig.from_pretrained(base)
    if not isinstance(config, MetaMorphConfig):
        raise ConversionError(f"{base} is a {config.model_type}, but must be a MetaMorph folder.")
    embedding_name = VOCABULARY_KEYS[0]
    if embedding_name not in trained:
        raise ConversionError(f"{source} lacks model.embed_tokens.weight: is it an mm_projector.bin of MetaMorph?")
    rows = trained.pop(embedding_name)
    if rows.ndim != 2 or len(rows) < 2:
        raise ConversionError(
            f"{source} has embeddings of shape {tuple(rows.shape)}, expected a matrix whose last two rows are those "
            "of <image_start> and <image_end>."
        )
    rows = rows[-2:]
    image_ids = [config.image_start_token_id, config.image_end_token_id]

    weights = Weights(base)
    expected = {name: shape for name, shape in weights.all_shapes.items() if name.startswith("model.projector.")}
    found = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    if expected != found:
        raise ConversionError(f"{source} has a projector of shapes {found}, but that of {base} has {expected}.")
    width = weights.all_shapes.get(embedding_name, (0, 0))[1]
    if rows.shape[1] != width:
        raise ConversionError(
            f"{source} has embeddings {rows.shape[1]} wide, but those of {base} are {width} wide: it was trained with "
            "another language model."
        )

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        for file in weights.shapes:
            shard = {}
            for name, tensor in weights.tensors(file):
                if name == embedding_name:
                    tensor = tensor.clone()
                    tensor[image_ids] = rows.to(tensor.dtype)
                tensor = trained[name].to(tensor.dtype) if name in trained else tensor
                shard[name] = (tensor if dtype is None else tensor.to(dtype)).contiguous()
            yield shard

    with whole_folder(target) as folder:
        weight_files = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
        described = shutil.ignore_patterns(*weight_files, "checkpoint-*", ".git")
        shutil.copytree(base, folder, ignore=described, dirs_exist_ok=True)
        write_shards(folder, shards(), len(weights.shapes), "Converting")
        if dtype is not None:
            config.dtype = dtype
            config.save_pretrained(folder)
        seen = check_forward(folder, on_disk=True)
    print_table(
        {
            "projector tensors": len(trained),
            "embedding rows": f"<image_start> {image_ids[0]}, <image_end> {image_ids[1]}",
            "everything else": f"from {base}",
            "loaded again": seen,
            "target": f"{target}, {size_of(target)}",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint folder, or a stage-1 mm_projector.bin")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; it must not exist")
    parser.add_argument(
        "--vision-tower",
        metavar="P",
        help="folder or repository of the SigLIP it was trained with; its weights are used only if SRC has none",
    )
    parser.add_argument("--tokenizer", metavar="P", help="folder or repository of the tokenizer")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights to this; default: leave them as they are")
    parser.add_argument("--base", metavar="P", type=Path, help="for an mm_projector.bin: the MetaMorph it goes into")
    args = parser.parse_args()

    dtype = DTYPES.get(args.dtype)
    stage1 = args.source / "mm_projector.bin" if args.source.is_dir() else args.source
    if args.base is not None or (args.source.is_file() or not Weights.in_folder(args.source)) and stage1.is_file():
        if args.vision_tower or args.tokenizer:
            raise ConversionError("With --base, vision tower and tokenizer are those of the base: leave both out.")
        if args.base is None:
            raise ConversionError(f"{stage1} holds a projector only: name the model it goes into, --base FOLDER.")
        convert_stage1(stage1, args.target, args.base, dtype)
    else:
        if not args.source.is_dir():
            raise ConversionError(f"{args.source} is no folder.")
        convert(args.source, args.target, args.vision_tower, args.tokenizer, dtype)


if __name__ == "__main__":
    run(main)
