"""Convert a visualizer of the released MetaMorph code to a diffusers pipeline folder.

    python conversion/convert_visualizer_to_diffusers.py SRC DST --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --model my-metamorph

SRC holds `unet_checkpoint.pt`, `adapter_checkpoint.pt` and `model_config.json`. VAE, scheduler and the U-Net's
configuration come from `--base`, the model that the visualizer was trained from. With `--model` DST is a complete
`MetaMorphPipeline`; without it, one that can only paint: `projector`, `unet`, `vae` and `scheduler`.
"""

import argparse
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    ConversionError,
    Weights,
    check_target,
    load_pickle,
    print_table,
    read_json,
    required,
    run,
    size_of,
    whole_folder,
)
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphPipeline, VisualTokenProjector


# Released prefix -> ours, per mode. Each released tensor starts with one of its mode's prefixes.
MLP_KEYS = {"layers.": "linears.", "norms.": "norms."}
CROSS_ATTENTION_KEYS = {
    "token_embeddings": "queries",
    "proj.": "input.",
    "input_norm.": "input_norm.",
    "cross_attn_layers.": "layers.",
}
TRANSFORMER_KEYS = {"query_embs": "queries", "fc.": "input.", "tfm.": "transformer.", "model.": "output."}
KEY_TABLE = {
    "mlp": MLP_KEYS,
    "xattn": CROSS_ATTENTION_KEYS,
    "xattnffn": CROSS_ATTENTION_KEYS,
    "transformer": TRANSFORMER_KEYS,
}
LAYER_PARTS = {".cross_attn.": ".attention.", ".ffn.": ".feed_forward."}
TRANSFORMER_HEADS = 4  # whatever model_config.json says


def our_name(name: str, mode: str) -> str:
    """Our name of a tensor of the released adapter."""
    for prefix, ours in KEY_TABLE[mode].items():
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
            if mode != "transformer":
                for part, replacement in LAYER_PARTS.items():
                    name = name.replace(part, replacement)
            return f"projection.{name}"
    raise ConversionError(f"The adapter holds {name}, which one of mode {mode!r} does not have.")


def model_weights(path: Path) -> dict[str, torch.Tensor]:
    """`model_state_dict` of one of the released `.pt` files."""
    if not path.is_file():
        raise ConversionError(
            f"{path} is missing. The released code writes checkpoint_step_*.pt and unet_checkpoint_step_*.pt: rename "
            "the ones you want to adapter_checkpoint.pt and unet_checkpoint.pt."
        )
    checkpoint = load_pickle(path)
    if "model_state_dict" not in checkpoint:
        raise ConversionError(f"{path} holds {', '.join(map(str, checkpoint))}, but no model_state_dict.")
    weights = checkpoint["model_state_dict"]
    return {name: Weights.checked(name, tensor, path) for name, tensor in weights.items()}


def load_exactly(module: torch.nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConversionError(
                f"The {what} does not fit its configuration: {name} has the shape {found.get(name, 'none (missing)')}"
                f", but {expected.get(name, 'none (no such tensor)')} was expected."
            )
    module.load_state_dict(weights)


def convert_projector(
    source: dict, weights: dict[str, torch.Tensor], num_image_tokens: int | None, sequence_length: int
) -> VisualTokenProjector:
    """
    Args:
        source (`dict`): The released `model_config.json`.
        weights (`dict[str, torch.Tensor]`): The adapter's weights by their released names.
        num_image_tokens (`int`, *optional*): Visual tokens per image, N; the released files do not tell it.
        sequence_length (`int`): What the base's text encoder gives, to which the states are padded with zeros.
    """
    file = "model_config.json"
    mode = required(source, "mode", str, file)
    if mode not in KEY_TABLE:
        raise ConversionError(f"model_config.json says mode {mode!r}, but it must be one of {', '.join(KEY_TABLE)}.")
    num_layers = required(source, "num_layers", int, file)
    projector = VisualTokenProjector(
        visual_token_dim=required(source, "input_dim", int, file),
        cross_attention_dim=required(source, "output_dim", int, file),
        projector_type=mode,
        # The released "mlp" has a first and a last layer at least.
        num_layers=max(2, num_layers) if mode == "mlp" else num_layers,
        hidden_dim=required(source, "hidden_dim", int, file),
        num_image_tokens=num_image_tokens,
        sequence_length=sequence_length,
        num_queries=None if mode == "mlp" else required(source, "num_tokens", int, file),
        num_heads=TRANSFORMER_HEADS if mode in ("mlp", "transformer") else required(source, "num_heads", int, file),
    )
    load_exactly(projector, {our_name(name, mode): tensor for name, tensor in weights.items()}, "adapter")
    return projector


def text_length(base: str) -> int:
    """How many text tokens the U-Net of `base` attended to: its text encoder's positions, 77 in Stable Diffusion."""
    file = cached_file(base, "config.json", subfolder="text_encoder", _raise_exceptions_for_missing_entries=False)
    return 77 if file is None else read_json(Path(file)).get("max_position_embeddings", 77)


def part_of(base: str, kind: type, subfolder: str):
    """VAE or scheduler of `base`, of whatever class it is; `kind` knows where such a part's configuration lies."""
    name = kind.load_config(base, subfolder=subfolder).get("_class_name", kind.__name__)
    return getattr(diffusers, name).from_pretrained(base, subfolder=subfolder)


def check_painting(folder: Path, dtype: torch.dtype) -> str:
    """Load the finished pipeline, answer if it can, and paint random visual tokens. Returns what was seen."""
    pipeline = MetaMorphPipeline.from_pretrained(folder, dtype={"model": "auto", "default": dtype})
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.projector.config
    tokens = F.normalize(
        torch.randn(1, config.num_image_tokens or min(64, config.sequence_length), config.visual_token_dim), dim=-1
    )
    picture = pipeline.decode_visual_tokens(tokens, num_inference_steps=2, output_type="pt")
    if not torch.isfinite(picture).all():
        raise ConversionError(f"The converted pipeline paints NaN or infinity in {dtype}.")
    if pipeline.processor is None:
        return f"a picture {tuple(picture.shape)}"
    (text,) = pipeline("A cat", max_new_tokens=2, num_inference_steps=1).text
    return f"a picture {tuple(picture.shape)}, an answer of {len(text)} letters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the released visualizer")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; it must not exist")
    parser.add_argument(
        "--base", metavar="P", required=True, help="folder or repository of the Stable Diffusion it began as"
    )
    parser.add_argument("--model", metavar="P", help="folder or repository of a MetaMorph in this package's layout")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights (default: float32)")
    args = parser.parse_args()

    check_target(args.target, args.source, args.base, args.model)
    adapter_config = read_json(args.source / "model_config.json")
    adapter = model_weights(args.source / "adapter_checkpoint.pt")
    model = processor = None
    if args.model is not None:
        model = AutoModel.from_pretrained(args.model, dtype="auto")
        if not isinstance(model, MetaMorphForConditionalGeneration):
            raise ConversionError(f"{args.model} is a {type(model).__name__}, but must be a MetaMorph.")
        if not Path(args.model).is_dir() or (Path(args.model) / "processor_config.json").is_file():
            processor = AutoProcessor.from_pretrained(args.model)
            found = (processor.image_token_id, processor.num_image_tokens)
            if found != (wanted := (model.config.image_token_id, model.config.num_image_tokens)):
                raise ConversionError(
                    f"The processor in {args.model} has <image> id and visual tokens per image {found}, but the model "
                    f"{wanted}: they do not belong together."
                )
        if model.config.visual_token_dim != adapter_config.get("input_dim"):
            raise ConversionError(
                f"The model's visual tokens are {model.config.visual_token_dim} wide, but the adapter takes "
                f"{adapter_config.get('input_dim')}: they do not belong together."
            )
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(args.base, subfolder="unet"))
    load_exactly(unet, model_weights(args.source / "unet_checkpoint.pt"), "U-Net")
    projector = convert_projector(
        adapter_config, adapter, None if model is None else model.config.num_image_tokens, text_length(args.base)
    )
    if projector.config.cross_attention_dim != unet.config.cross_attention_dim:
        raise ConversionError(
            f"The adapter gives states {projector.config.cross_attention_dim} wide, but the U-Net of {args.base} "
            f"attends to {unet.config.cross_attention_dim}: it was trained from another base."
        )
    pipeline = MetaMorphPipeline(
        model=model,
        processor=processor,
        projector=projector,
        unet=unet,
        vae=part_of(args.base, AutoencoderKL, "vae"),
        scheduler=part_of(args.base, DDPMScheduler, "scheduler"),
    )
    dtype = DTYPES[args.dtype]
    for part in (pipeline.projector, pipeline.unet, pipeline.vae):  # the model keeps its own
        part.to(dtype)
    with whole_folder(args.target) as folder:
        pipeline.save_pretrained(folder)
        seen = check_painting(folder, dtype)
    weights = [*unet.parameters(), *projector.parameters()]
    print_table(
        {
            "tensors": f"{len(unet.state_dict())} U-Net, {len(projector.state_dict())} projector",
            "parameters": f"{sum(weight.numel() for weight in weights):,}",
            "VAE, scheduler": f"from {args.base}",
            "model": f"{args.model}{'' if processor else ', which has no processor: the pipeline can only paint'}"
            if args.model
            else "none: the pipeline can only decode_visual_tokens(...)",
            "dtype": args.dtype,
            "loaded again": seen,
            "target": f"{args.target}, {size_of(args.target)}",
        }
    )


if __name__ == "__main__":
    run(main)
