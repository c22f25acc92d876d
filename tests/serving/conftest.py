"""A real server on the emoji checkpoint."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from helpers import EMOJI_CHECKPOINT

from metamorph_hf import MetaMorphPipeline


@dataclass
class RunningServer:
    """A server in a process of its own, its address, and the file with all that it has logged."""

    url: str
    key: str
    process: subprocess.Popen
    log: Path
    start_seconds: float = 0.0

    def find_processes(self, *titles: str) -> list[psutil.Process]:
        """Return Ray's processes of this server whose title contains one of the texts."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if any(title in " ".join(child.cmdline()) for title in titles)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The emoji checkpoint, with two denoising steps unless a request says otherwise, so that tests take less time."""
    folder = shutil.copytree(EMOJI_CHECKPOINT, tmp_path_factory.mktemp("quick") / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "default_num_inference_steps": 2}))
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint) -> MetaMorphPipeline:
    return MetaMorphPipeline.from_pretrained(checkpoint, dtype=torch.float32)


@contextmanager
def start_server(checkpoint: Path, folder: Path, *flags: str) -> Iterator[RunningServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "metamorph_hf.cli", "serve", str(checkpoint), "--port", str(port), *flags]
    log, key = folder / "server.log", "a-secret-key"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "METAMORPH_API_KEY": key, "RAY_TMPDIR": "/tmp"},
            start_new_session=True,
        )
    server = RunningServer(f"http://127.0.0.1:{port}", key, process, log)
    try:
        start = time.monotonic()
        while "is served on" not in log.read_text():
            assert process.poll() is None and time.monotonic() - start < 600, log.read_text()[-3000:]
            time.sleep(0.5)
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.start_seconds = time.monotonic() - start
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[RunningServer]:
    """A server with two copies of the pipeline, each on one core."""
    flags = ["--max-body-mb", "4", "--model-name", "emoji", "--replicas", "2", "--num-cpus", "1"]
    with start_server(checkpoint, tmp_path_factory.mktemp("server"), *flags) as running:
        yield running
