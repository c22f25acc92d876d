"""Convert a visualizer of the released MetaMorph code to a diffusers pipeline folder.

    python conversion/convert_visualizer_to_diffusers.py SRC DST --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --model my-metamorph

SRC holds `unet_checkpoint.pt`, `adapter_checkpoint.pt` and `model_config.json`. (The released code writes
`unet_checkpoint_step_*.pt` and `checkpoint_step_*.pt`: rename those of the step that you want.) VAE, scheduler and the
U-Net's configuration come from `--base`, the model that the visualizer was trained from. With `--model` DST is a
complete `MetaMorphPipeline`; without it, a pipeline that can only decode visual tokens into images.
"""

import argparse
from pathlib import Path

import common
import diffusers
import torch
import torch.nn.functional as F
from common import ConversionError, require_value
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image

from metamorph_hf import MetaMorphPipeline, VisualTokenProjector


CROSS_ATTENTION_KEYS = {
    r"^token_embeddings": "queries",
    r"^proj\.": "input.",
    r"^cross_attn_layers\.": "layers.",
    r"\.cross_attn\.": ".attention.",
    r"\.ffn\.": ".feed_forward.",
}
# Released names to ours, for each mode of the adapter.
KEY_TABLES = {
    "mlp": {r"^layers\.": "linears."},
    "xattn": CROSS_ATTENTION_KEYS,
    "xattnffn": CROSS_ATTENTION_KEYS,
    "transformer": {r"^query_embs": "queries", r"^fc\.": "input.", r"^tfm\.": "transformer.", r"^model\.": "output."},
}
TRANSFORMER_HEADS = 4  # The released transformer ignores the num_heads of model_config.json.


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the `model_state_dict` of one of the released `.pt` files."""
    checkpoint = common.read_file(path)
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise ConversionError(f"{path} does not hold a dictionary with a model_state_dict.")
    return common.check_tensors(checkpoint["model_state_dict"], path)


def convert_projector(folder: Path, num_image_tokens: int | None) -> VisualTokenProjector:
    """Convert the adapter of the visualizer in `folder`, whose files do not tell the number of visual tokens."""
    file = folder / "model_config.json"
    source = common.read_json(file)
    mode = require_value(source, "mode", str, file)
    if mode not in KEY_TABLES:
        raise ConversionError(f"{file} says mode {mode!r}, but it must be one of {', '.join(KEY_TABLES)}.")
    num_layers = require_value(source, "num_layers", int, file)
    projector = VisualTokenProjector(
        visual_token_dim=require_value(source, "input_dim", int, file),
        cross_attention_dim=require_value(source, "output_dim", int, file),
        projector_type=mode,
        num_layers=max(2, num_layers) if mode == "mlp" else num_layers,  # the released "mlp" has at least two
        hidden_dim=require_value(source, "hidden_dim", int, file),
        num_image_tokens=num_image_tokens,
        num_queries=None if mode == "mlp" else require_value(source, "num_tokens", int, file),
        num_heads=require_value(source, "num_heads", int, file) if "xattn" in mode else TRANSFORMER_HEADS,
    )
    weights = read_state_dict(folder / "adapter_checkpoint.pt")
    weights = {common.rename_key(name, KEY_TABLES[mode]): tensor for name, tensor in weights.items()}
    common.load_exactly(projector.projection, weights, f"The adapter in {folder}")
    return projector


def load_part(base: str, kind: type, subfolder: str):
    """Load the VAE or scheduler of `base`, whatever its class; `kind` knows where its configuration lies."""
    name = kind.load_config(base, subfolder=subfolder).get("_class_name", kind.__name__)
    return getattr(diffusers, name).from_pretrained(base, subfolder=subfolder)


def check_pipeline(folder: Path, dtype: torch.dtype) -> str:
    """Load the finished pipeline, decode random visual tokens, and answer if it can. Return what was seen."""
    pipeline = MetaMorphPipeline.from_pretrained(folder, dtype={"model": "auto", "default": dtype})
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.projector.config
    num_tokens = config.num_image_tokens or min(64, config.sequence_length)
    tokens = F.normalize(torch.randn(1, num_tokens, config.visual_token_dim), dim=-1)
    image = pipeline.decode_visual_tokens(tokens, num_inference_steps=2, output_type="pt")
    if not torch.isfinite(image).all():
        raise ConversionError(f"The converted pipeline gives NaN or infinity in {dtype}.")
    seen = f"an image {tuple(image.shape)}"
    if pipeline.processor is not None:
        (text,) = pipeline("Look", image=Image.new("RGB", (64, 48)), max_new_tokens=2, num_inference_steps=1).text
        seen += f", an answer of {len(text)} letters"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="folder of the released visualizer")
    add("target", metavar="DST", type=Path, help="folder to write; it must not exist")
    add("--base", metavar="P", required=True, help="folder or repository of the Stable Diffusion it was trained from")
    add("--model", metavar="P", help="folder or repository of a MetaMorph in this package's layout")
    add("--dtype", choices=common.DTYPES, default="float32", help="dtype of the written weights (default: float32)")
    args = parser.parse_args()

    common.check_target(args.target, args.source, args.base, args.model)
    model, processor = (None, None) if args.model is None else common.load_metamorph(args.model)
    projector = convert_projector(args.source, None if model is None else model.config.num_image_tokens)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(args.base, subfolder="unet"))
    common.load_exactly(unet, read_state_dict(args.source / "unet_checkpoint.pt"), f"The U-Net for {args.base}")
    pipeline = MetaMorphPipeline(
        model=model,
        processor=processor,
        projector=projector,
        unet=unet,
        vae=load_part(args.base, AutoencoderKL, "vae"),
        scheduler=load_part(args.base, DDPMScheduler, "scheduler"),
    )
    dtype = common.DTYPES[args.dtype]
    for part in (projector, unet, pipeline.vae):  # The model keeps its own dtype.
        part.to(dtype)
    table = {
        "parameters": f"{unet.num_parameters() + projector.num_parameters():,}",
        "VAE, scheduler": f"from {args.base}",
        "model": args.model,
        "prompts": "yes" if processor else "no: there is no processor, so the pipeline only decodes visual tokens",
        "dtype": args.dtype,
    }
    with common.write_folder(args.target, table) as folder:
        pipeline.save_pretrained(folder)
        table["loaded again"] = check_pipeline(folder, dtype)


if __name__ == "__main__":
    common.run_main(main)
