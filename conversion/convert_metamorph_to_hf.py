"""Convert a checkpoint of the released MetaMorph code (facebookresearch/metamorph) to this package's layout.

    python conversion/convert_metamorph_to_hf.py SRC DST --tokenizer meta-llama/Llama-3.1-8B-Instruct

SRC is a folder with `config.json` and the weights: `model.safetensors`, `pytorch_model.bin`, or shards of either.
Weights of `--vision-tower` are used only if SRC has none. Without `--tokenizer` the tokenizer in SRC is used; if there
is none either, DST gets no processor.

    python conversion/convert_metamorph_to_hf.py STAGE1/mm_projector.bin DST --base BASE

puts the results of the released code's stage 1 (the projector and the embeddings of the two image tokens) into a copy
of BASE, a MetaMorph such as init_from_pretrained.py makes.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import common
import torch
from chat_formats import METAMORPH_CHAT_TEMPLATE
from common import ConversionError, require_value
from transformers import AutoModel, AutoTokenizer, GenerationConfig, LlamaConfig, SiglipImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor


# Released names to ours.
KEY_TABLE = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.(?=weight|bias)": "model.mm_projector.0.",
    r"^model\.mm_projector\.": "model.projector.",
    r"^vision_head\.(?=weight|bias)": "vision_head.0.",
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "model.language_model.",
}
TOWER_PREFIX, EMBEDDINGS = "model.vision_tower.", "model.language_model.embed_tokens.weight"
# The released code never uses these: a projection without gradients, and the pooling head of SigLIP.
DEAD_MODULES = ("model.vision_proj", "model.vision_tower.head")
DEFAULT_TOWER = "google/siglip-so400m-patch14-384"  # the only shape that the released code can run
# The released defaults are other values, so each of these must be said.
CONVERTIBLE = {
    "model_type": ("metamorph_llama", "metamorph"),
    "mm_vision_select_layer": (-1,),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (True,),
    "image_token_reduction": ("interpolation", "concat_interpolation"),  # The layers of "mlpmixer" were never trained.
}


def convert_config(source: dict, vision_tower: str | None) -> MetaMorphConfig:
    """Translate the released `config.json`."""
    file = "config.json"
    for name, allowed in CONVERTIBLE.items():
        if (found := require_value(source, name, type(allowed[0]), file)) not in allowed:
            raise ConversionError(f"{file} says {name} = {found!r}, but must be {' or '.join(map(repr, allowed))}.")
    if source.get("apply_softmax"):
        raise ConversionError(f"{file} says apply_softmax, a loss that cannot be converted.")
    known = {field.name for field in fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
    text = {name: source[name] for name in known & source.keys() - {"model_type", "dtype"}}
    tower = MetaMorphConfig().vision_config if vision_tower is None else common.load_tower_config(vision_tower)
    if tower.model_type != "siglip_vision_model":
        raise ConversionError(f"{vision_tower} is a {tower.model_type}, but the released code knows SigLIP only.")
    tower.name_or_path = vision_tower or DEFAULT_TOWER
    vocab_size = require_value(source, "vocab_size", int, file)
    normalized = require_value(source, "normalize_vision", bool, file)
    head = source.get("vision_head_type")
    return MetaMorphConfig(
        text_config={"model_type": "llama", **text, "name_or_path": source.get("_name_or_path", "")},
        vision_config=tower,
        # The released code appends its two image tokens last and marks images by -200, which becomes one more id.
        image_start_token_id=vocab_size - 2,
        image_end_token_id=vocab_size - 1,
        image_token_id=vocab_size,
        num_image_tokens=require_value(source, "num_image_tokens", int, file),
        token_reduction=source["image_token_reduction"],
        projector_type=require_value({"mm_projector_type": "linear", **source}, "mm_projector_type", str, file),
        vision_head_type=head if head in ("mlp", "mlp2x_gelu") else "linear",  # as the released code reads it
        normalize_visual_tokens=normalized,
        visual_loss_type="cosine" if normalized else "l1",  # The released "mse_loss_fn" computes an l1 loss.
        visual_loss_weight=source.get("vision_coef", 1.0),
    )


def load_model(
    source: Path, config: MetaMorphConfig, dtype: torch.dtype | None
) -> tuple[MetaMorphForConditionalGeneration, list[str]]:
    """Load the released weights into our model. Return it and the names of the dead weights that are left out."""
    tower = config.vision_config.name_or_path
    weights = {common.rename_key(name, KEY_TABLE): tensor for name, tensor in common.read_weights(source).items()}
    dead = [name for name in weights if name.startswith(DEAD_MODULES)]
    weights = {name: tensor for name, tensor in weights.items() if name not in dead}
    if not any(name.startswith(TOWER_PREFIX) for name in weights):
        loaded = common.load_complete(AutoModel, tower, config=config.vision_config, dtype="auto")
        weights |= {TOWER_PREFIX + name: tensor for name, tensor in loaded.state_dict().items()}
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": dtype or "auto"}
    model, info = MetaMorphForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, **options)
    common.check_keys(f"{source}, read by its config.json and for the vision tower {tower},", info)
    if config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise ConversionError("config.json says tie_word_embeddings, but lm_head.weight differs from the embeddings.")
    model.resize_token_embeddings(config.image_token_id + 1, mean_resizing=False)
    for module in (model.lm_head, model.get_input_embeddings()):
        # In `inputs_embeds` without ids, images are found by this row, which must differ from padding with zeros.
        module.weight.data[-1] = module.weight[:-1].mean(0)
    return model, dead


def build_processor(
    tokenizer: PreTrainedTokenizerBase, image_processor, config: MetaMorphConfig
) -> MetaMorphProcessor:
    """Build the processor with the released code's chat format."""
    for field, token in common.IMAGE_TOKENS.items():
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        found, expected = tokenizer.convert_tokens_to_ids(token), getattr(config, field)
        if found != expected:
            message = "this is not the tokenizer that the checkpoint was trained with."
            raise ConversionError(f"{token} has the id {found}, but must have {expected}: {message}")
    common.prepare_tokenizer(tokenizer, "metamorph")
    return MetaMorphProcessor(
        image_processor, tokenizer, num_image_tokens=config.num_image_tokens, chat_template=METAMORPH_CHAT_TEMPLATE
    )


def convert(
    source: Path,
    target: Path,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert the checkpoint folder `source`; the arguments are those of the command line."""
    common.check_target(target, source, vision_tower, tokenizer)
    config = convert_config(common.read_json(source / "config.json"), vision_tower)
    model, dead = load_model(source, config, dtype)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig(**common.read_json(source / "generation_config.json"))
    # The released code stops at either end token of Llama 3, whatever its files say.
    stops = [model.generation_config.eos_token_id, config.text_config.eos_token_id]
    stops = {id for ids in stops if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    processor = None
    if tokenizer is not None or (source / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or source, config=config.text_config)
        side = config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(size={"height": side, "width": side}, do_convert_rgb=True)
        processor = build_processor(tokenizer, image_processor, config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        vocabulary = tokenizer.get_vocab()
        stops |= {vocabulary[token] for token in ("<|end_of_text|>", "<|eot_id|>") if token in vocabulary}
    if not stops:
        raise ConversionError("Neither config.json nor generation_config.json has an eos_token_id to end answers.")
    model.generation_config.eos_token_id = sorted(stops)
    dead_modules = [module for module in DEAD_MODULES if any(name.startswith(module) for name in dead)]
    table = {
        "parameters": f"{model.num_parameters():,}",
        "dead tensors left out": f"{len(dead)} ({', '.join(dead_modules) or 'none'})",
        "vision tower": config.vision_config.name_or_path,
        "image token ids": ", ".join(f"{token} {getattr(config, n)}" for n, token in common.IMAGE_TOKENS.items()),
        "dtype": model.dtype,
        "processor": "saved" if processor else "none: no tokenizer was found, name one with --tokenizer",
    }
    common.save_model(model, processor, target, table)


def convert_stage1(source: Path, target: Path, base: Path, dtype: torch.dtype | None = None) -> None:
    """Put the projector and the last two embedding rows of the released stage 1 into a copy of `base`."""
    common.check_target(target, base)
    trained = common.check_tensors(common.read_file(source), source)
    trained = {common.rename_key(name, KEY_TABLE): tensor for name, tensor in trained.items()}
    model, processor = common.load_metamorph(base, dtype or "auto")
    embeddings, rows = model.get_input_embeddings().weight.data, trained.pop(EMBEDDINGS, torch.empty(0))
    if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != embeddings.shape[1]:
        message = f"expected {embeddings.shape[1]} columns, and <image_start> and <image_end> as the last two rows."
        raise ConversionError(f"{source} holds model.embed_tokens.weight of shape {(*rows.shape,)}, {message}")
    image_ids = [model.config.image_start_token_id, model.config.image_end_token_id]
    embeddings[image_ids] = rows[-2:].to(embeddings.dtype)
    projector = {name.removeprefix("model.projector."): tensor for name, tensor in trained.items()}
    common.load_exactly(model.model.projector, projector, source)
    table = {
        "projector tensors": len(projector),
        "embedding rows": f"<image_start> {image_ids[0]}, <image_end> {image_ids[1]}",
        "everything else": f"from {base}",
    }
    common.save_model(model, processor, target, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="checkpoint folder, or a stage-1 mm_projector.bin")
    add("target", metavar="DST", type=Path, help="folder to write; it must not exist")
    add("--vision-tower", metavar="P", help=f"folder or repository of its SigLIP (default: {DEFAULT_TOWER})")
    add("--tokenizer", metavar="P", help="folder or repository of the tokenizer")
    add("--dtype", choices=common.DTYPES, help="dtype of the written weights, if not that of SRC")
    add("--base", metavar="P", type=Path, help="MetaMorph folder that an mm_projector.bin goes into")
    args = parser.parse_args()

    dtype = common.DTYPES.get(args.dtype)
    if args.base is not None:
        if args.vision_tower or args.tokenizer:
            raise ConversionError("With --base, vision tower and tokenizer are those of the base: leave both out.")
        stage1 = args.source / "mm_projector.bin" if args.source.is_dir() else args.source
        convert_stage1(stage1, args.target, args.base, dtype)
    elif args.source.is_dir():
        convert(args.source, args.target, args.vision_tower, args.tokenizer, dtype)
    else:
        raise ConversionError(f"{args.source} is not a folder. An mm_projector.bin needs a model, --base.")


if __name__ == "__main__":
    common.run_main(main)
