"""Make an autoregressive MetaMorph generate the visual tokens of an image in one forward pass.

    python conversion/enable_parallel_decoding.py SRC DST --images FOLDER

The copy in DST has `visual_decoding="parallel"` and new visual queries. They start as the mean of the projected visual
tokens of the images in FOLDER: some hundreds, of the kind that the model is to generate. The copy must be trained on,
e.g. by examples/train_vpit.py, to generate images again; text and image understanding stay as they were.
"""

import argparse
from pathlib import Path

import common
import torch
from common import ConversionError
from tqdm import tqdm

from metamorph_hf.image_reading import read_image


IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or repository of an autoregressive MetaMorph")
    add("target", metavar="DST", type=Path, help="folder to write; it must not exist")
    add("--images", metavar="FOLDER", type=Path, required=True, help="folder of png, jpg and webp images")
    add("--batch-size", type=int, default=16, help="images encoded at once (default: 16)")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    common.check_target(args.target, args.source)
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise ConversionError(f"{args.images} holds no png, jpg or webp images: name a folder that does.")
    model, processor = common.load_metamorph(args.source)
    if processor is None:
        raise ConversionError(f"{args.source} has no processor, which reads the images: add one.")
    visual_tokens = []
    for start in tqdm(range(0, len(paths), args.batch_size), desc="Encoding images", unit="batch"):
        images = [read_image(path) for path in paths[start : start + args.batch_size]]
        pixels = processor.image_processor(images, return_tensors="pt").pixel_values
        visual_tokens.append(model.get_visual_tokens(pixels))
    model.enable_parallel_decoding(torch.cat(visual_tokens))
    table = {"visual queries": f"{model.config.num_image_tokens}, from {len(paths)} images"}
    common.save_model(model, processor, args.target, table)


if __name__ == "__main__":
    common.run_main(main)
