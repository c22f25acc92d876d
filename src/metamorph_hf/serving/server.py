"""`metamorph-hf serve`: its settings, and the Ray Serve application that they describe."""

import argparse
import os
import signal
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from ..cli import find_pipeline, find_pipeline_class
from ..pipeline_metamorph import MetaMorphPipeline
from .remote_images import MAX_IMAGE_PIXELS


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Settings of a server: options of the command, and `args` of a configuration file for `serve deploy`."""

    pipeline: str = field(metadata={"help": "pipeline folder or Hub id"})
    model_name: str = setting("", "name of the model in the API (default: the last part of the pipeline's)")
    replicas: int = setting(1, "number of copies of the pipeline")
    num_gpus: float = setting(0, "GPUs per copy; a fraction shares one (default: 1 if there is a GPU)")
    num_cpus: float = setting(1, "CPU cores per copy (default: an even share of all, or 1 with a GPU)")
    max_batch_size: int = setting(32, "requests that are answered together")
    max_queue: int = setting(256, "requests that wait or run at once; more get 429")
    timeout: float = setting(300.0, "seconds until a request gets 504")
    max_body_mb: float = setting(20.0, "size of a request, images included")
    max_images: int = setting(8, "images in a request, and images in an answer")
    max_image_pixels: int = setting(MAX_IMAGE_PIXELS, "pixels of all images in a request")
    max_output_pixels: int = setting(2**20, "pixels of a generated image")
    max_tokens: int = setting(1024, "length of an answer, images included")
    max_n: int = setting(8, "answers, or decodings of an image, per request")
    max_steps: int = setting(200, "denoising steps")
    max_stored_mb: float = setting(64.0, "generated images kept for download from /v1/files; the oldest go first")
    allow_remote_images: bool = setting(False, "download image_url addresses, public ones only")
    public_url: str = setting("", "address of this server in the URLs of files (default: the request's)")
    api_key: str = setting("", "key that requests must carry; METAMORPH_API_KEY keeps it out of the process list")

    def __post_init__(self):
        self.model_name = self.model_name or Path(self.pipeline).name
        self.api_key = self.api_key or os.environ.get("METAMORPH_API_KEY", "")

    def __repr__(self) -> str:  # logs have neither the key nor paths
        return f"Settings(model_name={self.model_name!r})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    for item in fields(Settings):
        if item.default is MISSING:
            parser.add_argument(item.name, help=item.metadata["help"])
            continue
        text, default = item.metadata["help"], item.default
        if default and "(default" not in text:
            text += f" (default: {default})"
        kind = {"action": "store_true"} if item.type is bool else {"type": item.type}
        # A number of devices depends on the machine, so that `run` chooses it.
        kind |= {"default": None} if item.name in ("num_gpus", "num_cpus") else {"default": default}
        parser.add_argument(f"--{item.name.replace('_', '-')}", help=text, **kind)


def build(args: dict):
    """Return the Ray Serve application of these settings; `serve deploy` imports this function by its name."""
    from ray import serve

    from .engine import Engine
    from .openai_api import Server

    settings = Settings(**args)
    engine = serve.deployment(Engine).options(
        num_replicas=settings.replicas,
        ray_actor_options={"num_gpus": settings.num_gpus, "num_cpus": settings.num_cpus},
        max_ongoing_requests=2 * settings.max_batch_size,  # the next batch is ready when one ends
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
    )
    # One process for all replicas: it counts the requests and keeps the files.
    server = serve.deployment(serve.ingress()(Server)).options(
        name="Server", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10 * settings.max_queue
    )
    return server.bind(engine.bind(settings), settings)


def run(args: argparse.Namespace) -> None:
    """Serve until the process is stopped. With RAY_ADDRESS set, the replicas run on that cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own ports listen on all addresses
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # it ends the server if others fill the memory
    import ray
    import torch
    from ray import serve

    values = {item.name: getattr(args, item.name) for item in fields(Settings)}
    if values["num_gpus"] is None:
        values["num_gpus"] = int(torch.cuda.is_available())
    if values["num_cpus"] is None:
        values["num_cpus"] = 1 if values["num_gpus"] else max(1, os.cpu_count() // values["replicas"])
    # Without such a pipeline, replicas would try again and again.
    values["pipeline"] = str(find_pipeline(values["pipeline"]) or values["pipeline"])
    if find_pipeline_class(values["pipeline"]) is not MetaMorphPipeline:
        raise ValueError(f"{values['pipeline']} is a pipeline of another class than MetaMorphPipeline.")
    if Path(values["pipeline"]).exists():  # replicas have another working directory
        values["pipeline"] = str(Path(values["pipeline"]).resolve())

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    is_local = "RAY_ADDRESS" not in os.environ
    try:
        # Ray's dashboard runs any code that it is sent, and the API has metrics of its own.
        ray.init(logging_level="warning", **({"address": "local", "include_dashboard": False} if is_local else {}))
        serve.start(http_options={"host": args.host, "port": args.port})
        serve.run(build(values), name="metamorph")
        print(f"{Settings(**values).model_name} is served on http://{args.host}:{args.port}/v1", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("Stopping.")
    finally:
        if ray.is_initialized():
            serve.shutdown() if is_local else serve.delete("metamorph")  # others' applications run on a cluster
        ray.shutdown()
