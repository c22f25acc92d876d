"""Compare two CPU processes (gloo) with one, and runs killed by SIGKILL with uninterrupted ones."""

import functools
import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from distributed_training import run
from helpers import run_python
from safetensors.torch import load_file

from metamorph_hf.vpit.trainer import last_complete_checkpoint


SCRIPT = Path(__file__).parent / "distributed_training.py"


def launch(processes: int, *cases: dict) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    cases = json.dumps([{**case, "output": str(case["output"])} for case in cases])
    return run_python([*(launcher if processes > 1 else []), str(SCRIPT), cases], Path.cwd())


def result(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((output / "logs.json").read_text()), load_file(output / "final" / "model.safetensors")


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    (logs, weights), (other_logs, other_weights) = result(one), result(other)
    assert logs.keys() == other_logs.keys()
    for name, value in logs.items():
        assert value == pytest.approx(other_logs[name], rel=tolerance, abs=1e-6), name
    if "lm_head.weight" not in weights:  # It is tied, but FSDP saves it nevertheless.
        embeddings = other_weights["model.language_model.embed_tokens.weight"]
        assert torch.equal(other_weights.pop("lm_head.weight", embeddings), embeddings)
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        difference = (weight - other_weights[name]).norm() / weight.norm().clamp(min=1e-8)
        assert difference <= tolerance, f"{name} differs by {difference:.1e} of its norm"


CASES = {
    # With batches of one, some processes have no image or no text label in a step.
    "ddp": {"max_steps": 3, "gradient_accumulation_steps": 2},
    "ddp_projector": {"max_steps": 3, "stage": "projector", "tied": True},
    "fsdp": {"max_steps": 3, "gradient_accumulation_steps": 2, "fsdp": True},
    "fsdp_projector": {"max_steps": 3, "stage": "projector", "tied": True, "fsdp": True},
    "ddp_parallel": {"max_steps": 3, "gradient_accumulation_steps": 2, "parallel": True},
    "fsdp_parallel": {"max_steps": 3, "gradient_accumulation_steps": 2, "parallel": True, "fsdp": True},
    # The second pass begins within a step.
    "stream": {"max_steps": 5, "stream": True, "gradient_accumulation_steps": 3},
    # Four rows.
    "packed": {"max_steps": 2, "packing": True, "max_length": 60},
    "packed_stream": {"max_steps": 2, "packing": True, "max_length": 60, "stream": True},
    # One of the two processes has a NaN loss, so both skip the step.
    "nan": {"max_steps": 4, "nan": True, "on_nonfinite_loss": "skip"},
    "nan_gradient": {"max_steps": 3, "nan_gradient": True, "on_nonfinite_loss": "skip"},
}
DEEPSPEED_CASES = {
    "zero2": {"max_steps": 3, "gradient_accumulation_steps": 2, "zero": 2},
    "zero3": {"max_steps": 3, "gradient_accumulation_steps": 2, "zero": 3},
    "zero3_parallel": {"max_steps": 3, "gradient_accumulation_steps": 2, "parallel": True, "zero": 3},
    "zero3_projector": {"max_steps": 3, "stage": "projector", "tied": True, "zero": 3},
}

ALL_CASES = CASES | DEEPSPEED_CASES


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Return a function from a case to its output folder. All cases but DeepSpeed's run in one launch."""

    @functools.cache
    def run_all(*names: str) -> Path:
        folder = tmp_path_factory.mktemp("two")
        cases = [{"output": folder / n, "per_device_train_batch_size": 1, **ALL_CASES[n]} for n in names]
        done = launch(2, *cases)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return lambda name: run_all(*((name,) if name in DEEPSPEED_CASES else CASES)) / name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.optional) for name in DEEPSPEED_CASES)]
)
def test_two_processes_are_one(two_processes, tmp_path, name):
    """With SGD, a difference of gradients is a difference of weights. Evaluation is compared, too."""
    if name in DEEPSPEED_CASES:
        pytest.importorskip("deepspeed")
    case = {key: value for key, value in ALL_CASES[name].items() if key not in ("fsdp", "zero")}
    batch = 2 * case.pop("gradient_accumulation_steps", 1)
    run(tmp_path, per_device_train_batch_size=batch, **case)
    assert result(tmp_path)[0]["skipped_steps"] == int("nan" in name)
    assert_same(tmp_path, two_processes(name), tolerance=1e-5)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, processes, parallel) -> Path:
    """The folder of three runs: one that nobody kills, and two that were killed and went on."""
    options = {
        "max_steps": 6,
        "parallel": parallel,
        "optim": "adamw_torch",
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": 2 // processes,
        "lr_scheduler_type": "cosine",
        "save_total_limit": 1,  # An older checkpoint stays until the newer one is complete.
    }
    folder, kills = tmp_path_factory.mktemp("killed"), ("step", "save")
    for kill in kills:
        assert launch(processes, {"output": folder / kill, "kill": kill, **options}).returncode != 0
        assert (folder / kill / "checkpoint-4").exists() == (kill == "save")
        assert last_complete_checkpoint(folder / kill) == str(folder / kill / "checkpoint-2")
    resumed = [{"output": folder / kill, "resume": True, **options} for kill in kills]
    done = launch(processes, *resumed, {"output": folder / "whole", **options})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "parallel"), [(1, False), (2, False), (2, True)], scope="module")
@pytest.mark.parametrize("kill", ["step", "save"])
def test_killed_runs_resume(killed_runs, processes, kill):
    assert_same(killed_runs / "whole", killed_runs / kill, tolerance=0.0 if processes == 1 else 1e-6)
