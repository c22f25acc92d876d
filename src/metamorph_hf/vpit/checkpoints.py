"""Finding the checkpoint from which an interrupted run resumes."""

import json
import re
import zipfile
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState


logger = get_logger(__name__)


class RecordProcesses(TrainerCallback, ExportableState):
    """Record in `trainer_state.json` how many processes save their random states in a checkpoint."""

    def state(self) -> dict:
        return {"args": {}, "attributes": {"num_processes": PartialState().num_processes}}

    def on_train_begin(self, args, state, control, **kwargs):
        # A run may have resumed from a checkpoint without the entry, which Trainer does not add to the loaded state.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Return the newest checkpoint folder in `output_dir` that holds all files that a resumed run needs, or None. A
    folder with missing or truncated files, as an interrupted save leaves it, is passed over with a warning.
    """
    folders = Path(output_dir).glob("checkpoint-[0-9]*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.rsplit("-")[-1]), reverse=True):
        problems = _find_problems(folder)
        if not problems:
            return str(folder)
        logger.warning(f"{folder} was not saved completely and is passed over: {', '.join(problems)}.")
    return None


def _find_problems(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return [f"{TRAINER_STATE_NAME} is missing or truncated"]  # Trainer writes it last.
    needed = [r"rng_state.*\.pth"]
    if recorded := state["stateful_callbacks"].get(RecordProcesses.__name__):
        processes = recorded["attributes"]["num_processes"]
        needed = [rf"rng_state_{index}\.pth" for index in range(processes)] if processes > 1 else [r"rng_state\.pth"]
    names = [path.name for path in folder.iterdir()]
    if not any(name.startswith("global_step") for name in names):  # DeepSpeed's folder for all of these
        needed += [r"(adapter_)?model.*\.safetensors|pytorch_model_fsdp.*", "optimizer.*", re.escape(SCHEDULER_NAME)]
    for index in folder.glob("*.safetensors.index.json"):
        needed += map(re.escape, sorted(set(json.loads(index.read_text())["weight_map"].values())))
    missing = [pattern for pattern in needed if not any(re.fullmatch(pattern, name) for name in names)]
    truncated = [path.name for path in sorted(folder.rglob("*")) if _is_truncated(path)]
    return [f"{pattern} is missing" for pattern in missing] + [f"{name} is truncated" for name in truncated]


def _is_truncated(path: Path) -> bool:
    """Compare the length of a file of weights or states with the table of contents in it."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except SafetensorError:
            return True
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)


__all__ = ["last_complete_checkpoint"]
