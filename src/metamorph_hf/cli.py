"""The command `metamorph-hf`, and functions that it shares with the scripts in `examples/`."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain, count
from pathlib import Path

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from transformers.utils import logging

from .image_reading import read_image
from .pipeline_metamorph import MetaMorphPipeline


COMMANDS = {
    "generate": (".cli", "generate images or text"),
    "serve": (".serving.server", "serve a pipeline with an OpenAI-compatible API"),
    "app": (".serving.app", "chat with a pipeline in the browser"),
}


@contextmanager
def exit_with_sentence() -> Iterator[None]:
    """Turn an expected error (a missing file, a refused input) into an exit with its sentence, without a traceback."""
    try:
        yield
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))


def find_pipeline(path_or_repo: str | Path) -> Path | None:
    """Return the pipeline folder that this folder is or belongs to, as `pipeline/model` does; None without one."""
    folder = Path(path_or_repo)
    if (folder / "model_index.json").is_file():
        return folder
    index = folder.parent / "model_index.json"
    return folder.parent if index.is_file() and folder.name in json.loads(index.read_text("utf-8")) else None


def find_pipeline_class(path_or_repo: str | Path) -> type[DiffusionPipeline]:
    """Return MetaMorphPipeline if the pipeline's model_index.json names it, else DiffusionPipeline."""
    class_name = DiffusionPipeline.load_config(path_or_repo)["_class_name"]
    return MetaMorphPipeline if "MetaMorphPipeline" in class_name else DiffusionPipeline


def load_pipeline(
    path_or_repo: str | Path, device: torch.device | str | None = None, any_class: bool = False
) -> DiffusionPipeline:
    """Load a pipeline, or exit with a sentence that says what is wrong with the folder.

    Args:
        path_or_repo: Pipeline folder, one of its components' folders, or Hub id.
        device: Defaults to the GPU if there is one. The dtype is float32 on a CPU and bfloat16 elsewhere.
        any_class: Whether it may be another pipeline than MetaMorphPipeline.
    """
    path_or_repo = find_pipeline(path_or_repo) or path_or_repo
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        pipeline_class = find_pipeline_class(path_or_repo) if any_class else MetaMorphPipeline
        return pipeline_class.from_pretrained(path_or_repo, dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"{path_or_repo} cannot be loaded; it is missing or incomplete. {type(error).__name__}: {error}")


def add_arguments(parser: argparse.ArgumentParser, default_model: str | Path | None = None) -> None:
    """Add the arguments of `generate`."""
    parser.add_argument("prompt", help='caption of an image to generate ("a red apple"), or a request about --image')
    text = "default: emoji model" if default_model else "required"
    required = {"default": default_model} if default_model else {"required": True}
    parser.add_argument("--model", help=f"pipeline folder or Hub id ({text})", **required)
    parser.add_argument("--image", action="append", default=[], help="image to ask about or to edit; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("generated.png"), help="image file; numbered if it exists")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise that becomes an image (default: 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum length of the answer (default: 128)")


def run(args: argparse.Namespace) -> None:
    """Answer the prompt of `generate`: print the text, save the images."""
    logging.disable_progress_bar()
    if PIL.Image.registered_extensions().get(args.out.suffix.lower()) not in PIL.Image.SAVE:
        raise ValueError(f"--out {args.out} must end in the extension of an image format, such as .png.")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(
            f"--out {args.out} is in a folder that does not exist: create {args.out.parent} first."
        )
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
    numbered = (args.out.with_stem(f"{args.out.stem}_{number}") for number in count(2))
    free = (path for path in chain([args.out], numbered) if args.overwrite or not path.exists())
    for image, path in zip(output.images, free):
        image.save(path)
        print(f"saved {path} ({image.width}x{image.height})")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="metamorph-hf", description="Use a MetaMorph pipeline.")
    commands = parser.add_subparsers(dest="command", required=True)
    with exit_with_sentence():
        try:
            for name, (module, text) in COMMANDS.items():
                command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
                if argv[:1] == [name]:  # the libraries of a command are imported where it is used
                    used = import_module(module, __package__)
                    used.add_arguments(command)
            args = parser.parse_args(argv)
            used.run(args)
        except ModuleNotFoundError as error:
            if argv[0] not in ("serve", "app"):  # the commands that need an extra
                raise
            raise ModuleNotFoundError(
                f"metamorph-hf {argv[0]} needs {error.name}, which is not installed: "
                f'pip install ".[{argv[0]}]" in the folder of metamorph_hf'
            ) from error


if __name__ == "__main__":
    main()
