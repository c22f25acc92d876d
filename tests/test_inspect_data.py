"""examples/inspect_data.py."""

import sys

import pytest
import yaml
from helpers import EMOJI_CHECKPOINT, ROWS, import_example, write_jsonl

from metamorph_hf import MetaMorphProcessor


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder and returns what it prints."""

    def run(config: dict, *flags) -> str:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(config))
        flags = ["mixture.yaml", "--model", EMOJI_CHECKPOINT, *flags]
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, flags)])
        import_example("inspect_data.py").main()
        return capsys.readouterr().out

    return run


def test_samples_and_page(run, tmp_path, emoji_parquet):
    source = {"task": "text_to_image", "path": "parquet", "columns": {"caption": "name"}, "num_samples": 20}
    source["data_files"] = str(emoji_parquet)
    printed = run({"mixture": [source]}, "--samples", 2, "--html", "page.html", "--throughput")
    assert "20 samples read" in printed
    num_image_tokens = MetaMorphProcessor.from_pretrained(EMOJI_CHECKPOINT / "processor").num_image_tokens
    assert printed.count(f"{{<image> x {num_image_tokens}}}") == 2
    assert "[<image_end><|end|>]" in printed
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 2 and page.count("<h3>text_to_image") == 2
    assert "training step" in printed


@pytest.mark.parametrize(("options", "limit"), [({"max_length": 60}, 60), ({}, 512)], ids=["max_length", "context"])
def test_bad_samples_are_printed(run, tmp_path, options, limit):
    """The length that training would refuse is refused here, too."""
    rows = [ROWS["chat"], "{broken", {"messages": [*ROWS["chat"]["messages"]] * 99}]
    printed = run({"mixture": [{"task": "chat", "path": write_jsonl(tmp_path / "chat.jsonl", rows)}], **options})
    assert printed.count("BAD: Example row ") == 2
    assert "is line 2 of" in printed and f"more than max_length={limit}." in printed


def test_no_mixture(run):
    with pytest.raises(SystemExit, match="mixture.yaml has no mixture"):
        run({"seed": 1})
