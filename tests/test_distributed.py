"""Two CPU processes (gloo) against one, and runs killed by SIGKILL against uninterrupted ones."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_training import run
from safetensors.torch import load_file

from metamorph_hf.vpit_trainer import last_complete_checkpoint


SCRIPT = Path(__file__).parent / "distributed_training.py"


def launch(processes: int, *cases: dict) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    cases = json.dumps([{**case, "output": str(case["output"])} for case in cases])
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), cases]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def result(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((output / "logs.json").read_text()), load_file(output / "final" / "model.safetensors")


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    (logs, weights), (other_logs, other_weights) = result(one), result(other)
    assert logs["losses"] == pytest.approx(other_logs["losses"], rel=tolerance)
    assert logs["eval_loss"] == pytest.approx(other_logs["eval_loss"], rel=tolerance)
    if "lm_head.weight" not in weights:  # tied; FSDP saves it all the same
        embeddings = other_weights["model.language_model.embed_tokens.weight"]
        assert torch.equal(other_weights.pop("lm_head.weight", embeddings), embeddings)
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        difference = (weight - other_weights[name]).norm() / weight.norm().clamp(min=1e-8)
        assert difference <= tolerance, f"{name} differs by {difference:.1e} of its norm"


CASES = {
    # Batches of one: some processes have no image, some no text, in a step of the others.
    "ddp": {"max_steps": 3, "gradient_accumulation_steps": 2},
    "ddp_projector": {"max_steps": 3, "stage": "projector", "tied": True},
    "fsdp": {"max_steps": 3, "gradient_accumulation_steps": 2, "fsdp": True},
    "fsdp_projector": {"max_steps": 3, "stage": "projector", "tied": True, "fsdp": True},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    cases = [{"output": folder / n, "per_device_train_batch_size": 1, **case} for n, case in CASES.items()]
    done = launch(2, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two_processes, tmp_path, name):
    """SGD, so that a difference of gradients is one of weights; evaluation over the processes, too."""
    case = {key: value for key, value in CASES[name].items() if key != "fsdp"}
    batch = 2 * case.pop("gradient_accumulation_steps", 1)
    run(tmp_path, per_device_train_batch_size=batch, **case)
    assert_same(tmp_path, two_processes / name, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kill", "last"), [(1, "step", 2), (2, "save", 2)])
def test_killed_runs_go_on(tmp_path, processes, kill, last):
    options = {
        "max_steps": 6,
        "optim": "adamw_torch",
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": 2 // processes,
        "lr_scheduler_type": "cosine",
    }
    done = launch(processes, {"output": tmp_path / "cut", "kill": kill, **options})
    assert done.returncode != 0
    assert (tmp_path / "cut" / "checkpoint-4").exists() == (kill == "save")
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / f"checkpoint-{last}")
    done = launch(
        processes, {"output": tmp_path / "cut", "resume": True, **options}, {"output": tmp_path / "whole", **options}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "whole", tmp_path / "cut", tolerance=0.0 if processes == 1 else 1e-6)
