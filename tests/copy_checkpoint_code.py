"""Copy the code that travels with the emoji checkpoint, after it has changed: python tests/copy_checkpoint_code.py"""

import shutil
from pathlib import Path


ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "metamorph_hf"
CODE = [
    Path(path)
    for path in (
        "pipeline_metamorph.py",
        "pipeline_saving.py",
        "generation_checks.py",
        "model/configuration_metamorph.py",
        "model/generation_checks.py",
        "model/generation_metamorph.py",
        "model/model_cards.py",
        "model/modeling_metamorph.py",
        "processor/image_reading.py",
        "processor/processing_metamorph.py",
        "projector/visual_token_projector.py",
        "unet/small_visualizer.py",
        "vae/small_visualizer.py",
    )
]


if __name__ == "__main__":
    for path in CODE:
        shutil.copy(SOURCES / path.name, ROOT / "examples" / "emoji" / "checkpoint" / path)
