"""Ask a MetaMorph pipeline for images or text.

    python examples/generate.py "a red apple"                                   # text to image
    python examples/generate.py "What is this?" --image photo.png               # a question about an image
    python examples/generate.py "make the skin tone dark" --image hand.png      # an edit

Without --model it uses the small emoji model in this repository, which knows emoji and nothing else. It runs on a CPU
in seconds.
"""

import argparse
from pathlib import Path

import torch
from common import EMOJI_CHECKPOINT, exit_with_sentence, load_pipeline
from transformers.utils import logging

from metamorph_hf.image_reading import read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help='caption of an image to generate ("a red apple"), or a request about --image')
    parser.add_argument("--model", default=EMOJI_CHECKPOINT, help="pipeline folder or Hub id (default: emoji model)")
    parser.add_argument("--image", action="append", default=[], help="image to ask about or to edit; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("generated.png"), help="file of the generated image")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise that becomes an image (default: 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum length of the answer (default: 128)")
    args = parser.parse_args()

    logging.disable_progress_bar()
    with exit_with_sentence():
        images = [read_image(path) for path in args.image]
        pipe = load_pipeline(args.model)
        output = pipe(
            args.prompt,
            image=images or None,
            num_inference_steps=args.steps,
            generator=torch.Generator(pipe.device).manual_seed(args.seed),
            max_new_tokens=args.max_new_tokens,
        )
        print(output.text[0])
        for number, image in enumerate(output.images, start=1):
            path = args.out if number == 1 else args.out.with_stem(f"{args.out.stem}_{number}")
            image.save(path)
            print(f"saved {path} ({image.width}x{image.height})")


if __name__ == "__main__":
    main()
