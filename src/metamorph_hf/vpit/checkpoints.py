"""Finding the checkpoint from which an interrupted run resumes."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Return the newest checkpoint folder in `output_dir` that holds all files that a resumed run needs, or None. A
    folder with missing or truncated files, as an interrupted save leaves it, is passed over with a warning.
    """
    for folder in reversed(find_checkpoints(output_dir)):
        problems = find_problems(folder)
        if not problems:
            return str(folder)
        logger.warning(f"{folder} was not saved completely and is passed over: {', '.join(problems)}.")
    return None


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir` by step. Files, and copies with names of their own, are none."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in folders}
    return sorted((folder for folder in folders if steps[folder]), key=lambda folder: int(steps[folder][1]))


def find_problems(folder: Path) -> list[str]:
    """Name the truncated files of a checkpoint, or else the missing ones."""
    truncated = [f"{path.name} is truncated" for path in sorted(folder.rglob("*")) if _is_truncated(path)]
    if truncated:
        return truncated
    # VPiTTrainer writes its state last, after the random states of all processes.
    needed = [re.escape(TRAINER_STATE_NAME), r"rng_state.*\.pth"]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(name.startswith("global_step") for name in names):  # DeepSpeed's folder for all of these
        needed += [r"(adapter_)?model.*\.safetensors|pytorch_model_fsdp.*", "optimizer.*", re.escape(SCHEDULER_NAME)]
    for index in folder.glob("*.safetensors.index.json"):
        needed += map(re.escape, sorted(set(json.loads(index.read_bytes())["weight_map"].values())))
    missing = [f"{pattern} is missing" for pattern in needed if not any(re.fullmatch(pattern, name) for name in names)]
    if TRAINER_STATE_NAME in names:
        try:
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except TypeError:
            missing.append(f"{TRAINER_STATE_NAME} is not a trainer's state")
    return missing


def _is_truncated(path: Path) -> bool:
    """Parse JSON, and compare the length of a file of weights or states with the table of contents in it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (ValueError, SafetensorError):
        return True
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)
