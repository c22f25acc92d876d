"""Helpers that the scripts in this folder share. Their folder is on `sys.path`, so that they can import `common`."""

from pathlib import Path

from metamorph_hf.cli import exit_with_sentence, find_pipeline, load_pipeline


__all__ = ["EMOJI_CHECKPOINT", "exit_with_sentence", "find_pipeline", "load_pipeline", "resolve_model"]

EMOJI_CHECKPOINT = Path(__file__).parent / "emoji" / "checkpoint"


def resolve_model(path_or_repo: str | Path) -> tuple[str, str]:
    """Return where a model and its processor are, given a model, a pipeline folder, or a pipeline's model folder."""
    pipeline = find_pipeline(path_or_repo)
    if pipeline is None:
        return str(path_or_repo), str(path_or_repo)
    return str(pipeline / "model"), str(pipeline / "processor")
