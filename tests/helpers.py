"""Helpers of several test modules: golden paths, tiny examples, and a process without this package."""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metamorph_hf import VPiTConfig, VPiTTrainer


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
PLACEHOLDER = 224  # the released code has -200 in the ids and 224 rows; ours is one id more
EMOJI_CHECKPOINT = ROOT / "examples" / "emoji" / "checkpoint"

EXAMPLES_FOLDER = ROOT / "examples"

SPECIAL_TOKENS = ("<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<image_start>", "<image_end>")


def run_example(script: str, *arguments, cwd: Path, environment: dict | None = None) -> subprocess.CompletedProcess:
    """Run a script of `examples/` as a user does."""
    return run_python([str(EXAMPLES_FOLDER / script), *map(str, arguments)], cwd, environment)


def run_example_in_two_processes(script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of `examples/` on two CPU processes, as `accelerate launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return run_python([*launcher, str(EXAMPLES_FOLDER / script), *map(str, arguments)], cwd)


def run_python(
    command: list[str], cwd: Path, environment: dict | None = None, timeout: int = 300
) -> subprocess.CompletedProcess:
    """Run a script, or `-m` and a module, in a fork of a process that has imported the libraries, which would take
    seconds each time. With an `environment` it gets a new process, since libraries read variables when they are
    imported; with CUDA too, which does not survive a fork, and on other systems than Linux, where forks are unsafe."""
    if environment or torch.cuda.is_available() or sys.platform != "linux":
        command, environment = [sys.executable, *command], {**os.environ, **(environment or {})}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["helpers", "metamorph_hf.visualizer_training", "metamorph_hf.pipeline_metamorph"])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        process = forks.Process(target=become_script, args=(command, cwd, outputs))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, *(path.read_bytes() for path in outputs))
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def become_script(command: list[str], cwd: Path, outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def import_example(script: str) -> ModuleType:
    """Import a script of `examples/` as its own process would, with its folder first on `sys.path`, or a module of the
    package there, such as "emoji.tasks"."""
    conversion_common = sys.modules.pop("common", None)
    sys.path.insert(0, str(EXAMPLES_FOLDER))
    try:
        return importlib.import_module(script.removesuffix(".py"))
    finally:
        sys.path.remove(str(EXAMPLES_FOLDER))
        sys.modules.pop("common", None)
        if conversion_common is not None:
            sys.modules["common"] = conversion_common


def byte_tokenizer(special_tokens: tuple[str, ...], **kwargs) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and special tokens for padding, end of turn and more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        **kwargs,
    )


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (16 * 16 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (16, 16), bytes(pixels.tolist()))


def conversation(question, answer, images):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": images,
    }


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


EXAMPLES = [
    conversation([text("draw a cat")], [IMAGE], [picture(0)]),
    conversation([IMAGE, text("what is this?")], [text("a cat")], [picture(1)]),
    conversation([text("hello")], [text("hello to you, a long answer of many words")], []),
    conversation(
        [IMAGE, text("make it red")], [text("here"), IMAGE, text("done"), IMAGE], [picture(n) for n in range(3)]
    ),
    conversation([text("say yes")], [text("yes")], []),
    conversation([text("two cats")], [IMAGE, IMAGE], [picture(4), picture(5)]),
    conversation([IMAGE, IMAGE, text("same?")], [text("no")], [picture(6), picture(7)]),
    conversation([text("a dog")], [IMAGE], [picture(8)]),
]


def arguments(tmp_path, **kwargs) -> VPiTConfig:
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return VPiTConfig(**{**defaults, **kwargs})


def examples_with_nan() -> list[dict]:
    """Return examples with visual tokens instead of images; those of sample 5 are NaN."""
    examples = []
    for number, example in enumerate(EXAMPLES):
        tokens = torch.full((len(example["images"]), 4, 16), float("nan") if number == 5 else 0.1)
        examples.append({"id": f"sample-{number}", "messages": example["messages"], "visual_tokens": list(tokens)})
    return examples


def dataset_of(examples):
    # A transform keeps PIL images and mixed contents as they are; Arrow columns would not.
    return Dataset.from_dict({"place": list(range(len(examples)))}).with_transform(
        lambda columns: {key: [examples[place][key] for place in columns["place"]] for key in examples[0]}
    )


def build_trainer(model, processor, args, examples=EXAMPLES, **kwargs) -> VPiTTrainer:
    return VPiTTrainer(model, args, processing_class=processor, train_dataset=dataset_of(examples), **kwargs)


def train(*args, **kwargs) -> VPiTTrainer:
    trainer = build_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


STRANGER = """
import sys

sys.modules["metamorph_hf"] = None  # importing it raises ImportError
import torch
import transformers
from PIL import Image

folder, out = sys.argv[1:]
{}
"""


def run_as_stranger(code: str, folder: Path, tmp_path: Path):
    """Run `code` in a process without this package, and return its variable `found`."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            STRANGER.format(code) + "torch.save(found, out)",
            str(folder),
            str(tmp_path / "found.pt"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "found.pt", weights_only=True)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


LLAVA = {
    "id": "a",
    "image": "1.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A grey."}],
}
ROWS = {
    "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]},
    "llava": LLAVA,
    "text_to_image": {"caption": "a grey square.", "image": "2.png"},
    "image_to_image": {"source": "3.png", "instruction": "Make it brighter.", "target": "4.png"},
    "reconstruction": {"image": "6.png"},
    "visual_thinking": {"image": "5.png", "question": "Which?", "answer": "This.", "boxes": [2, 2, 10, 12]},
    "video_qa": {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Light."}]},
    "video_prediction": {},
}
