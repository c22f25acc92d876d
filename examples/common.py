"""What the scripts in this folder share. Their folder is on `sys.path`, so they write `from common import ...`.

The scripts in `emoji/` have that folder on `sys.path` instead of this one; they share code through the package.
"""

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
    except (OSError, ValueError) as error:
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


def load_pipeline(
    path_or_repo: str | Path,
    pipeline_class: type[DiffusionPipeline] = MetaMorphPipeline,
    device: torch.device | str | None = None,
    **kwargs,
) -> DiffusionPipeline:
    """Load a pipeline, or exit with a sentence that says what is wrong with the folder.

    Args:
        path_or_repo: Pipeline folder, one of its components' folders, or Hub id.
        device: Defaults to the GPU if there is one. The dtype is float32 on a CPU and bfloat16 elsewhere.
        kwargs: More for `from_pretrained`.
    """
    pipeline = find_pipeline(path_or_repo)
    if pipeline is None and Path(path_or_repo).exists():
        sys.exit(
            f"{path_or_repo} is not a pipeline folder: it has no model_index.json. A MetaMorphPipeline folder has "
            "subfolders for model, processor, projector, unet, vae and scheduler, as `save_pretrained` writes them."
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"dtype": torch.float32 if device.type == "cpu" else torch.bfloat16, **kwargs}
    try:
        return pipeline_class.from_pretrained(pipeline or path_or_repo, **options).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"{path_or_repo} cannot be loaded; it is missing or incomplete. {type(error).__name__}: {error}")
