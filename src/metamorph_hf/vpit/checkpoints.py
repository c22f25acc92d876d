"""Finding the checkpoint from which an interrupted run resumes."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Return the newest checkpoint folder in `output_dir` that holds all files that a resumed run needs, or None. A
    folder with missing or truncated files, as an interrupted save leaves it, is passed over with a warning.
    """
    for folder in reversed(sort_checkpoints(str(output_dir))):
        problems = _find_problems(Path(folder))
        if not problems:
            return folder
        logger.warning(f"{folder} was not saved completely and is passed over: {', '.join(problems)}.")
    return None


def _find_problems(folder: Path) -> list[str]:
    """Name the truncated files of a checkpoint, or else the missing ones."""
    truncated = [f"{path.name} is truncated" for path in sorted(folder.rglob("*")) if _is_truncated(path)]
    if truncated:
        return truncated
    # VPiTTrainer writes its state last, after the random states of all processes.
    needed = [re.escape(TRAINER_STATE_NAME), r"rng_state.*\.pth"]
    names = [path.name for path in folder.iterdir()]
    if not any(name.startswith("global_step") for name in names):  # DeepSpeed's folder for all of these
        needed += [r"(adapter_)?model.*\.safetensors|pytorch_model_fsdp.*", "optimizer.*", re.escape(SCHEDULER_NAME)]
    for index in folder.glob("*.safetensors.index.json"):
        needed += map(re.escape, sorted(set(json.loads(index.read_text())["weight_map"].values())))
    return [f"{pattern} is missing" for pattern in needed if not any(re.fullmatch(pattern, name) for name in names)]


def _is_truncated(path: Path) -> bool:
    """Parse JSON, and compare the length of a file of weights or states with the table of contents in it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (json.JSONDecodeError, SafetensorError):
        return True
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)


__all__ = ["last_complete_checkpoint"]
