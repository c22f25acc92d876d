"""examples/inspect_data.py, run as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import EMOJI_CHECKPOINT, ROOT, ROWS, write_jsonl


SCRIPT = ROOT / "examples" / "inspect_data.py"


def run(config: dict, folder: Path, *flags) -> subprocess.CompletedProcess:
    (folder / "mixture.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, SCRIPT, "mixture.yaml", "--model", EMOJI_CHECKPOINT, *map(str, flags)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_samples_and_page(tmp_path):
    source = {"task": "text_to_image", "path": "parquet", "columns": {"caption": "name"}, "num_samples": 20}
    source["data_files"] = str(ROOT / "examples" / "emoji" / "emoji.parquet")
    done = run({"mixture": [source]}, tmp_path, "--samples", 2, "--html", "page.html", "--throughput")
    assert done.returncode == 0, done.stderr
    assert "20 samples read" in done.stdout
    assert done.stdout.count("{<image> x 16}") == 2
    assert "[<image_end><|end|>]" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 2 and page.count("<h3>text_to_image") == 2
    assert "training step" in done.stdout


def test_bad_samples_are_printed(tmp_path):
    """The length that training would refuse is refused here, too."""
    rows = [ROWS["chat"], "{broken", {"messages": [*ROWS["chat"]["messages"]] * 9}]
    mixture = [{"task": "chat", "path": write_jsonl(tmp_path / "chat.jsonl", rows)}]
    done = run({"mixture": mixture, "max_length": 60}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("BAD: Example row ") == 2
    assert "is line 2 of" in done.stdout and "more than max_length=60" in done.stdout


def test_no_mixture(tmp_path):
    done = run({"seed": 1}, tmp_path)
    assert done.returncode == 1 and "mixture.yaml has no mixture" in done.stderr
