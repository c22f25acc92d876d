"""Helpers that the scripts in this folder share. Their folder is on `sys.path`, so that they can import `common`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from metamorph_hf import MetaMorphPipeline


EMOJI_CHECKPOINT = Path(__file__).parent / "emoji" / "checkpoint"


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
    return next((path for path in (folder, folder.parent) if (path / "model_index.json").is_file()), None)


def resolve_model(path_or_repo: str | Path) -> tuple[str, str]:
    """Return where a model and its processor are, given a model, a pipeline folder, or a pipeline's model folder."""
    pipeline = find_pipeline(path_or_repo)
    if pipeline is None:
        return str(path_or_repo), str(path_or_repo)
    return str(pipeline / "model"), str(pipeline / "processor")


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
