"""Measure training, generation and decoding on one GPU, and check that they agree with the CPU.

    python examples/benchmarks/gpu.py                    # eight minutes at most; writes gpu.json and gpu.md
    python examples/benchmarks/gpu.py --tiny --device cpu     # tiny models, to see that everything runs

All weights are random. A row that does not fit the memory, the time or the installed libraries is listed as left out,
with the reason. Utilization is relative to this GPU's own speed of a large bfloat16 matrix product.
"""

import argparse
import importlib.util
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, SiglipVisionConfig

from metamorph_hf import (
    MetaMorphConfig,
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
    VisualTokenProjector,
    __version__,
)
from metamorph_hf.vpit.collator import join_rows
from metamorph_hf.vpit.packing import pack_lengths
from metamorph_hf.vpit.stages import complete_peft_config
from metamorph_hf.vpit.text_loss import measure_text


TESTS = Path(__file__).parents[2] / "tests"
# Hidden width, layers, width of the MLP, heads and heads of keys and values: Llama 3.2 1B and Llama 3.1 8B.
SIZES = {"1 B": (2048, 16, 8192, 32, 8), "8 B": (4096, 32, 14336, 32, 8), "tiny": (64, 2, 64, 4, 2)}
Batch = dict[str, torch.Tensor]


class OutOfTime(Exception):
    """The time given by `--minutes` is over."""


class Report:
    """Rows of results, and what was left out."""

    def __init__(self, device: torch.device, deadline: float, only: list[str] | None):
        self.device, self.deadline, self.only = device, deadline, only
        self.rows: list[dict] = []
        self.left_out: dict[str, str] = {}

    def is_wanted(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)

    def measure(self, name: str, run: Callable[[], dict | list[dict]], needs: str | None = None, seconds=0) -> None:
        """Store the numbers that `run` returns under `name`, unless a part or `seconds` of time are missing."""
        if not self.is_wanted(name):
            return
        try:
            if needs is not None and importlib.util.find_spec(needs) is None:
                raise ImportError(f"{needs} is not installed")
            if time.monotonic() > self.deadline - seconds:
                raise RuntimeError("too little time is left")
            found = run()
        except (ImportError, ValueError, RuntimeError) as error:  # torch raises a RuntimeError if memory is short
            self.left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(name, "LEFT OUT", self.left_out[name], sep="  ", flush=True)
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        for numbers in found if isinstance(found, list) else [found]:
            self.rows.append({"what": name, **numbers})
            print(name, *(f"{key}: {value}" for key, value in numbers.items()), sep="  ", flush=True)

    def time(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Return the median seconds of `run`, after one run that is not counted."""
        seconds = []
        for _ in range(repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def format(self, facts: dict[str, str]) -> str:
        """Return the Markdown table."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in self.rows]
        reasons = [f"- {name}: {reason}" for name, reason in self.left_out.items()] or ["- nothing"]
        return "\n".join([*lines, "", "Left out:", *reasons, ""])


def build_model(size: str, device: torch.device, dtype: torch.dtype, **config) -> MetaMorphForConditionalGeneration:
    """Build a Llama of a size of `SIZES` with a SigLIP so400m-shaped tower, on the device."""
    hidden, layers, mlp, heads, kv_heads = SIZES[size]
    vocabulary, is_tiny = (256, True) if size == "tiny" else (128_256, False)
    text_config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=32 if is_tiny else 1152,
        intermediate_size=64 if is_tiny else 4304,
        num_hidden_layers=2 if is_tiny else 27,
        num_attention_heads=2 if is_tiny else 16,
        image_size=56 if is_tiny else 384,
        patch_size=14,
        vision_use_head=False,
    )
    ids = {
        "image_token_id": vocabulary - 1,
        "image_end_token_id": vocabulary - 2,
        "image_start_token_id": vocabulary - 3,
    }
    configuration = MetaMorphConfig(text_config=text_config, vision_config=vision_config, **ids, **config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MetaMorphForConditionalGeneration(configuration)
    finally:
        torch.set_default_dtype(default)
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batches(model: MetaMorphForConditionalGeneration, count: int, row: int, flat: bool) -> dict[str, Batch]:
    """Return conversations of 90 to 600 tokens, padded, and packed in rows of `row` tokens (`flat`: in one row)."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    image = torch.full((config.num_image_tokens + 2,), config.image_token_id)
    image[0], image[-1] = config.image_start_token_id, config.image_end_token_id
    conversations = []
    for number in range(count):
        words = torch.randint(1, config.image_start_token_id, (24 + 500 * number // count,), generator=generator)
        ids = torch.cat([words, image] if number % 2 else [image, words])
        labels = ids.clone()
        labels[: len(ids) // 2 if number % 2 == 0 else len(words)] = -100
        conversations.append((ids, labels))
    size = config.vision_config.image_size
    pixels = torch.randn(count, 3, size, size, generator=generator)
    lengths = [len(ids) for ids, _ in conversations]
    rows = [list(range(count))] if flat else pack_lengths(lengths, row)
    order = [index for indices in rows for index in indices]
    padded = join_rows([[each] for each in conversations], 0, is_packed=False) | {"pixel_values": pixels}
    packed = join_rows([[conversations[index] for index in indices] for indices in rows], 0, is_packed=True)
    packed["pixel_values"] = pixels[order]
    return {
        name: {key: value.to(model.device) for key, value in batch.items()}
        for name, batch in (("padded", padded), ("packed", packed))
    }


def check_packing(report: Report, attention: str) -> dict[str, str]:
    """Compare the loss of packed and padded conversations in a tiny model."""
    is_flash = "flash" in attention
    torch.manual_seed(0)
    model = build_model("tiny", report.device, torch.bfloat16 if is_flash else torch.float32, num_image_tokens=16)
    model.train().set_attn_implementation(attention)
    batches = make_batches(model, 8, 600, flat=is_flash)
    padded, packed = (
        model(**batch, use_cache=False, measure_text=measure_text).loss.item() for batch in batches.values()
    )
    return {"difference": f"{abs(packed - padded) / abs(padded):.1e}"}


def run_tests(report: Report) -> dict[str, str]:
    """Run the tests that name a device."""
    if not TESTS.is_dir():
        raise ImportError(f"{TESTS} is missing: clone the repository")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "device or offload", str(TESTS)]
    seconds = max(10, min(120, report.deadline - time.monotonic()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"they took more than {seconds:.0f} seconds") from error
    last = [*done.stderr.splitlines(), *done.stdout.splitlines()][-1]
    if done.returncode not in (0, 1):  # 1: some of them failed
        raise RuntimeError(last)
    return {"result": last}


def measure_matmul(report: Report, size: int) -> float:
    """Return the bfloat16 operations per second of a large matrix product."""
    matrix = torch.randn(size, size, device=report.device, dtype=torch.bfloat16)
    return 2 * size**3 / report.time(lambda: matrix @ matrix)


def quantize(model: MetaMorphForConditionalGeneration) -> None:
    """Replace the language model's linear layers by 4-bit ones, as QLoRA has them."""
    import bitsandbytes

    for module in list(model.model.language_model.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear):
                options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "device": "meta"}
                quantized = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                quantized.weight = weight.to(model.device)
                setattr(module, name, quantized)
    model.is_loaded_in_4bit = True


def measure_training(
    report: Report, args: argparse.Namespace, size: str, kind: str, attention: str, peak_speed: float
) -> list[dict]:
    """Time whole steps (forward, backward, AdamW) with gradient checkpointing, padded and packed."""
    # Full training keeps float32 weights, as the trainer does; adapters leave the model in bfloat16.
    base = build_model(size, report.device, torch.float32 if kind == "full" else torch.bfloat16)
    base.set_attn_implementation(attention)
    weights = sum(p.numel() for name, p in base.named_parameters() if "vision_tower" not in name)
    if kind == "QLoRA":
        quantize(base)
    model = base
    if kind != "full":
        model = get_peft_model(base, complete_peft_config(LoraConfig(r=16, lora_alpha=32), base))
    model.train()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=report.device.type == "cuda")

    def step(batch: Batch) -> None:
        with torch.autocast(report.device.type, torch.bfloat16):
            loss = model(**batch, use_cache=False, measure_text=measure_text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = make_batches(base, args.conversations, 2048, flat="flash" in attention)
    tokens, rows = batches["padded"]["attention_mask"].sum().item(), []
    for layout, batch in batches.items():
        if report.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = report.time(partial(step, batch), args.repeats)
        # Frozen weights have no gradients; recomputation and the tower are not counted as useful.
        speed = (6 if kind == "full" else 4) * weights * tokens / seconds
        rows.append(
            {"layout": layout, "real tokens/s": round(tokens / seconds), "of peak": f"{speed / peak_speed:.2f}"}
        )
        if report.device.type == "cuda":
            rows[-1]["peak GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
    return rows


def measure_cross_entropy(report: Report, args: argparse.Namespace, kind: str) -> dict:
    """Time the cross-entropy of 8,192 positions and its gradients in one of four ways, in float32 under autocast as
    `VPiTTrainer` trains."""
    model = build_model("tiny" if args.tiny else "1 B", report.device, torch.bfloat16)
    head, count = model.lm_head.float(), 64 if args.tiny else 8192
    hidden_states = torch.randn(count, head.in_features, device=report.device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(model.config.image_start_token_id, (count,), device=report.device)
    if kind == "trainer":
        loss = lambda: measure_text(model, hidden_states, labels)[0].mean()  # noqa: E731
    elif kind == "chunks":
        loss = lambda: model.measure_text(hidden_states, labels)[0].mean()  # noqa: E731
    elif kind == "whole":
        loss = lambda: F.cross_entropy(head(hidden_states).float(), labels)  # noqa: E731
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = partial(LigerFusedLinearCrossEntropyLoss(), head.weight, hidden_states, labels)

    def step() -> None:
        with torch.autocast(report.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        head.weight.grad = hidden_states.grad = None

    is_cuda = report.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    numbers = {"layout": kind, "ms": f"{1000 * report.time(step):.1f}"}
    if is_cuda:
        numbers["peak GB"] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f}"
    return numbers


@torch.no_grad()
def measure_generation(report: Report, model: MetaMorphForConditionalGeneration, batch: int, **options) -> dict:
    """Time an image's tokens after a prompt of 128."""
    ids = torch.randint(1, model.config.image_start_token_id, (batch, 128), device=model.device)
    ids[:, -1] = model.config.image_start_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    count = model.config.num_image_tokens + 1
    seconds = report.time(partial(model.generate, **inputs, max_new_tokens=count, **options), 1)
    return {"images/s": f"{batch / seconds:.2f}", "ms/token": f"{1000 * seconds / count:.2f}"}


@torch.no_grad()
def measure_decoding(report: Report, args: argparse.Namespace) -> list[dict]:
    """Time a Stable Diffusion 1.5-shaped U-Net that decodes visual tokens into images of 512 pixels."""
    dtype = torch.float32 if report.device.type == "cpu" else torch.float16
    widths, vae_widths = ((32, 64), (32, 32)) if args.tiny else ((320, 640, 1280, 1280), (128, 256, 512, 512))
    width, count = 32 if args.tiny else 768, len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=8 if args.tiny else 64,
        block_out_channels=widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * count, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * count),
        cross_attention_dim=width,
    )
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
        layers_per_block=2,
        latent_channels=4,
    )
    projector = VisualTokenProjector(visual_token_dim=1152, cross_attention_dim=width)
    parts = {"projector": projector, "unet": unet, "vae": vae, "scheduler": DDIMScheduler()}
    pipe = MetaMorphPipeline(model=None, processor=None, **parts).to(report.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    options, rows = {"num_inference_steps": args.denoising_steps, "output_type": "pt"}, []
    for batch in (1, 4):
        tokens = F.normalize(torch.randn(batch, projector.config.num_image_tokens, 1152), dim=-1)
        run = partial(pipe.decode_visual_tokens, tokens.to(report.device, dtype), **options)
        rows.append({"layout": f"batch {batch}", "images/s": f"{batch / report.time(run, 1):.2f}"})
    return rows


def measure_all(report: Report, args: argparse.Namespace, peak_speed: float) -> None:
    """Measure in the order of interest, as long as there is time."""
    for attention, needs in (("eager", None), ("sdpa", None), ("flash_attention_2", "flash_attn")):
        report.measure(f"packed loss, {attention}", partial(check_packing, report, attention), needs)
    if report.device.type == "cuda":
        report.measure("packed loss, flex_attention", partial(check_packing, report, "flex_attention"))
    report.measure("decoding, U-Net of Stable Diffusion 1.5", partial(measure_decoding, report, args), seconds=30)
    for size, kind in (("1 B", "full"), ("8 B", "LoRA"), ("8 B", "QLoRA")):
        for attention, needs in (("sdpa", None), ("flash_attention_2", "flash_attn")):
            run = partial(measure_training, report, args, "tiny" if args.tiny else size, kind, attention, peak_speed)
            report.measure(f"training, {size}, {kind}, {attention}", run, needs, seconds=args.training_seconds)
    for kind, needs in (("trainer", None), ("chunks", None), ("whole", None), ("Liger", "liger_kernel")):
        report.measure("cross-entropy, 8,192 positions", partial(measure_cross_entropy, report, args, kind), needs)
    static = {"cache_implementation": "static"}
    modes = {"eager": {}, "static": {**static, "disable_compile": True}, "compiled": static}
    decodings = {
        decoding: build_model(
            "tiny" if args.tiny else "1 B", report.device, torch.bfloat16, visual_decoding=decoding
        ).eval()
        for decoding in ("autoregressive", "parallel")
    }
    for mode, options in modes.items():
        for batch in args.batches:
            for decoding, model in decodings.items():
                name = f"generation, 1 B, {decoding}, {mode}, batch {batch}"
                if mode == "compiled" and report.device.type == "cpu":
                    if report.is_wanted(name):
                        report.left_out[name] = "steps are compiled on GPUs"
                else:
                    run = partial(measure_generation, report, model, batch, **options)
                    report.measure(name, run, seconds=args.training_seconds / 2)
    if not args.tiny:
        report.measure("tests that name a device", partial(run_tests, report), "pytest", seconds=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="use tiny models and few repetitions")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="parts of the names of rows to measure (default: all)"
    )
    parser.add_argument("--minutes", type=float, default=8, help="stop after so many minutes (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="path of .json and .md (default: gpu)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; on a CPU, pass --tiny --device cpu")
    if args.device == "cpu" and not args.tiny:
        parser.error("a CPU needs --tiny")
    args.conversations, args.repeats, args.training_seconds = (4, 1, 5) if args.tiny else (16, 3, 90)
    args.batches, args.denoising_steps = ((1, 2), 2) if args.tiny else ((1, 16, 64), 50)
    report = Report(torch.device(args.device), time.monotonic() + 60 * args.minutes, args.only)

    def stop(*_) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, round(60 * args.minutes) - 10))
    facts = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "metamorph_hf": __version__,
        "models": "tiny, whatever the rows say" if args.tiny else "as named",
    }
    try:
        peak_speed = measure_matmul(report, 256 if args.tiny else 8192)
        facts["bfloat16 matrix product, TFLOP/s"] = f"{peak_speed / 1e12:.3g}"
        measure_all(report, args, peak_speed)
    except OutOfTime:
        report.left_out["all that would come next"] = f"{args.minutes:g} minutes are over"
    signal.alarm(0)
    if not report.rows and not report.left_out:
        parser.error(f"no row's name has one of the parts {args.only}: run without --only to see all names")
    args.output.with_suffix(".md").write_text(report.format(facts))
    content = {"facts": facts, "rows": report.rows, "left_out": report.left_out}
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1))
    print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
