"""Ask a MetaMorph pipeline for pictures or words.

    python examples/generate.py "a red apple"                                   # text to image
    python examples/generate.py "What is this?" --image picture.png             # a question about an image
    python examples/generate.py "make the skin tone dark" --image hand.png      # an edit

Without --model it uses the small emoji model in this repository, which knows emoji and nothing else. It runs on the
CPU in seconds.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers.utils import logging

from metamorph_hf import MetaMorphPipeline
from metamorph_hf.image_reading import ImageReadError, read_image


EMOJI = Path(__file__).parent / "emoji" / "checkpoint"


def load_pipeline(
    path_or_repo: str,
    pipeline_class: type[DiffusionPipeline] = MetaMorphPipeline,
    device: torch.device | str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline, or leave with a sentence that says what is wrong with the folder."""
    path = Path(path_or_repo)
    if path.exists() and not (path / "model_index.json").is_file():
        sys.exit(
            f"{path} is no pipeline folder: it has no model_index.json. A MetaMorphPipeline folder holds model, "
            "processor, projector, unet, vae and scheduler, as pipeline.save_pretrained writes them."
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        return pipeline_class.from_pretrained(path_or_repo, dtype=dtype).to(device)
    # Hub, safetensors, JSON and torch each have their own way to say that files are missing or cut off.
    except Exception as error:
        sys.exit(
            f"{path_or_repo} could not be loaded; it is missing or only half written. {type(error).__name__}: {error}"
        )


def load_picture(path: str) -> Image.Image:
    try:
        return read_image(Path(path))
    except ImageReadError as error:
        sys.exit(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help='what to draw ("a red apple"), or what to ask or do about --image')
    parser.add_argument("--model", default=str(EMOJI), help="pipeline folder or Hub id (default: the emoji model)")
    parser.add_argument("--image", action="append", help="picture to ask about or to edit; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("generated.png"), help="where the picture goes")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the painting")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of the answer (default: 128)")
    args = parser.parse_args()

    logging.disable_progress_bar()
    pictures = [load_picture(path) for path in args.image or []]
    pipe = load_pipeline(args.model)
    try:
        output = pipe(
            args.prompt,
            image=pictures or None,
            num_inference_steps=args.steps,
            generator=torch.Generator(pipe.device).manual_seed(args.seed),
            max_new_tokens=args.max_new_tokens,
        )
    except ValueError as error:
        sys.exit(str(error))
    print(output.text[0])
    for number, image in enumerate(output.images):
        path = args.out if number == 0 else args.out.with_stem(f"{args.out.stem}_{number + 1}")
        try:
            image.save(path)
        except (OSError, ValueError) as error:
            sys.exit(f"The picture cannot be written to {path}: {error}.")
        print(f"saved {path} ({image.width}x{image.height})")


if __name__ == "__main__":
    main()
