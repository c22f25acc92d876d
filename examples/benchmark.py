"""Measure generation against the bare language model and against decoding as the released code does it.

    python examples/benchmark.py                    # a small model, two minutes on 2 CPU cores
    python examples/benchmark.py --pipeline         # the pipeline instead, against Stable Diffusion's; a minute
    python examples/benchmark.py --hidden 1024 --layers 16 --device cuda --dtype bfloat16 --compile --json result.json

All weights are random, because speed does not depend on them. The two sides of a ratio are timed in turns in this
process where they take about as long, so that a noisy machine disturbs both. The median of `--repeats` times counts,
or of three times as many for ratios near 1.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, SiglipVisionConfig

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPTS = [f"a {color} {thing}" for color in ("red", "blue", "tiny", "huge") for thing in ("cat", "dog", "car", "hat")]


def build_model(args: argparse.Namespace) -> MetaMorphForConditionalGeneration:
    """Build a Llama and a SigLIP tower of the sizes in `args`."""
    text_config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=args.tower_hidden,
        intermediate_size=4 * args.tower_hidden,
        num_hidden_layers=args.tower_layers,
        num_attention_heads=args.tower_hidden // 64,
        image_size=224,
        patch_size=16,
        vision_use_head=False,
    )
    config = MetaMorphConfig(
        text_config=text_config,
        vision_config=vision_config,
        num_image_tokens=args.visual_tokens,
        image_token_id=args.vocabulary - 1,
        image_end_token_id=args.vocabulary - 2,
        image_start_token_id=args.vocabulary - 3,
    )
    return MetaMorphForConditionalGeneration(config).to(args.device, DTYPES[args.dtype]).eval()


def build_bare_llm(model: MetaMorphForConditionalGeneration):
    """Build the same language model without MetaMorph; it shares the weights."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(model.config.text_config)
    llm.model, llm.lm_head = model.model.language_model, model.lm_head
    return llm.eval()


class Timer:
    """Times functions in turns, on the device `device`."""

    def __init__(self, device: str, repeats: int, clock: Callable[[], float] = time.perf_counter):
        self.device, self.repeats, self.clock = device, repeats, clock

    def __call__(self, *runs: Callable[[], object]) -> list[float]:
        """Return the median seconds of each function."""
        for run in (*runs, *runs):  # warm-up, also of the allocator
            run()
        times = [[] for _ in runs]
        for _ in range(self.repeats):
            for run, seconds in zip(runs, times):
                self.synchronize()
                start = self.clock()
                run()
                self.synchronize()
                seconds.append(self.clock() - start)
        return [statistics.median(seconds) for seconds in times]

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def run_released_step(model: MetaMorphForConditionalGeneration, length: int) -> None:
    """Run a visual step as the released code does: the whole sequence again, and logits of all of its positions."""
    embeds = torch.randn(1, length, model.config.text_config.hidden_size).to(model.device, model.dtype)
    hidden_states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    embed = model.model.projector(F.normalize(model.vision_head(hidden_states[:, -1:]), dim=-1))
    model.lm_head(torch.cat([hidden_states[:, :-1], embed], dim=1)).float()


def time_import(statement: str) -> float:
    """Return the seconds of a process that runs `statement`, the smaller of two tries."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - start

    return min(run(), run())


def make_prompt(model: MetaMorphForConditionalGeneration, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Make random ids (batch, length) without image tokens."""
    ids = torch.randint(10, model.config.image_start_token_id - 10, (batch, length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_text(model, inputs: dict, count: int, **kwargs) -> Callable[[], object]:
    return lambda: model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **kwargs)


def generate_image(model, batch: int, length: int, **kwargs) -> Callable[[], object]:
    """Generate an image and its `<image_end>`, N + 1 steps, after a prompt that ends with `<image_start>`."""
    inputs = make_prompt(model, batch, length)
    inputs["input_ids"][:, -1] = model.config.image_start_token_id
    steps = model.config.num_image_tokens + 1
    return lambda: model.generate(**inputs, max_new_tokens=steps, do_sample=False, **kwargs)


def measure_decoding(model, args: argparse.Namespace, timer: Timer) -> dict[str, float]:
    steps, length, results = args.visual_tokens, args.prompts[0], {}
    llm, inputs, count = build_bare_llm(model), make_prompt(model, 1, length), steps + 2  # room for an image
    image, ours, disabled, bare = Timer(args.device, 3 * args.repeats)(
        generate_image(model, 1, length),
        write_text(model, inputs, count),
        write_text(model, inputs, count, max_images=0),
        write_text(llm, inputs, count),
    )
    results[f"visual steps / text steps of the bare LLM, prompt {length}"] = (image / (steps + 1)) / (bare / count)
    results["text-only generate / bare LLM"] = ours / bare
    results["text-only generate with max_images=0 / bare LLM"] = disabled / bare

    for prompt in args.prompts:
        (ours,) = timer(generate_image(model, 1, prompt))
        # Four steps of the released loop, evenly spread over the image, stand for all.
        lengths = [prompt + round((number + 0.5) * steps / 4) for number in range(4)]
        released = Timer(args.device, 1)(*(partial(run_released_step, model, current) for current in lengths))
        results[f"released loop / ours, batch 1, prompt {prompt}"] = sum(released) * steps / 4 / ours

    static = {"cache_implementation": "static", "disable_compile": True}
    one, four, sixteen, fixed = timer(
        *(generate_image(model, batch, length) for batch in (1, 4, 16)), generate_image(model, 16, length, **static)
    )
    results["images per second, batch 1"] = 1 / one
    results["images per second, batch 4 / batch 1"] = 4 * one / four
    results["images per second, batch 16 / batch 1"] = 16 * one / sixteen
    results["images per second, batch 16, static cache / batch 1"] = 16 * one / fixed

    if args.compile:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # otherwise transformers compiles on accelerators only
        compiled = {"cache_implementation": "static", "compile_config": compile_config}
        seconds = timer(*(generate_image(model, 1, length, **options) for options in ({}, static, compiled)))
        results["visual steps, static cache / dynamic"] = seconds[1] / seconds[0]
        results["visual steps, static cache and compiled / dynamic"] = seconds[2] / seconds[0]
    return results


def measure_prefill(model, args: argparse.Namespace, timer: Timer) -> dict[str, float]:
    config, results = model.config, {}
    image = [config.image_start_token_id, *[config.image_token_id] * args.visual_tokens, config.image_end_token_id]
    for count in args.images:
        pixels = torch.randn(count, 3, 224, 224).to(args.device, model.dtype)
        question = make_prompt(model, 1, 128)["input_ids"]
        ids = torch.cat([torch.tensor([image * count], device=args.device), question], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_images": 0}
        encode, reuse = timer(
            write_text(model, {**inputs, "pixel_values": pixels}, 1),
            write_text(model, {**inputs, "visual_tokens": model.get_visual_tokens(pixels)}, 1),
        )
        results[f"prefill with {count} images, seconds"] = encode
        results[f"the same from visual_tokens / from pixels, {count} images"] = reuse / encode
    return results


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, float]:
    timer, model = Timer(args.device, args.repeats), build_model(args)
    results = measure_decoding(model, args, timer) | measure_prefill(model, args, timer)
    ours, theirs = time_import("import metamorph_hf"), time_import("from transformers import LlamaForCausalLM")
    results["import metamorph_hf / import LlamaForCausalLM"] = ours / theirs
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # of the whole run, because a process cannot reset its maximum
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return results | {"peak memory, MB": peak / 1e6}


def build_pipeline(args: argparse.Namespace, widths: tuple[int, int], latent_size: int):
    """Build a pipeline with the emoji model's processor, a tiny language model, and a U-Net with `widths`."""
    # Imported here, because they would count in the peak memory of the other measurements.
    from common import EMOJI_CHECKPOINT
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from metamorph_hf import MetaMorphPipeline, MetaMorphProcessor, VisualTokenProjector

    processor = MetaMorphProcessor.from_pretrained(EMOJI_CHECKPOINT / "processor")
    config = MetaMorphConfig.from_pretrained(EMOJI_CHECKPOINT / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.text_config.update({**sizes, "num_key_value_heads": 2, "head_dim": 32})
    config.vision_config.update(sizes)
    model = MetaMorphForConditionalGeneration(MetaMorphConfig.from_dict(config.to_dict()))
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=widths,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=64,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    projector = VisualTokenProjector(
        visual_token_dim=64, cross_attention_dim=64, hidden_dim=64, num_image_tokens=processor.num_image_tokens
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = MetaMorphPipeline(model.eval(), processor, projector.eval(), unet.eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device, None if args.dtype == "float32" else DTYPES[args.dtype])


@torch.no_grad()
def measure_pipeline(args: argparse.Namespace) -> dict[str, float]:
    from diffusers import StableDiffusionPipeline

    timer = Timer(args.device, args.repeats, time.process_time if args.cpu_time else time.perf_counter)
    results = {}

    pipe = build_pipeline(args, widths=(64, 128), latent_size=16)
    stable = StableDiffusionPipeline(
        **{name: getattr(pipe, name) for name in ("unet", "vae", "scheduler")},
        **{name: None for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")},
        requires_safety_checker=False,
    )
    stable.set_progress_bar_config(disable=True)
    tokens = torch.randn(4, pipe.projector.config.num_image_tokens, 64).to(args.device, pipe.dtype)
    states = pipe.projector(tokens)
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": torch.zeros_like(states)}
    for guidance in (1.0, 7.5):
        options = {"num_inference_steps": args.denoising_steps, "guidance_scale": guidance, "output_type": "pt"}
        ours, theirs = timer(
            lambda options=options: pipe.decode_visual_tokens(tokens, **options),
            lambda options=options: stable(**embeds, **options),
        )
        results[f"decoding 4 images / StableDiffusionPipeline, guidance {guidance}"] = ours / theirs

    pipe = build_pipeline(args, widths=(16, 32), latent_size=8)
    options = {"num_inference_steps": args.denoising_steps, "max_new_tokens": pipe.processor.num_image_tokens + 2}
    options["generation_kwargs"] = {"force_image": True, "max_images": 1}
    together, alone = timer(lambda: pipe(PROMPTS, **options), lambda: [pipe(prompt, **options) for prompt in PROMPTS])
    return results | {"16 prompts in one call / in 16 calls": together / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the language model (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="size of the vocabulary (default: 32000)")
    parser.add_argument("--visual-tokens", type=int, default=64, help="visual tokens per image (default: 64)")
    parser.add_argument("--tower-hidden", type=int, default=192, help="width of the vision tower (default: 192)")
    parser.add_argument("--tower-layers", type=int, default=4, help="layers of the vision tower (default: 4)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048], help="lengths (default: 128 2048)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16], help="images in a prompt (default: 1 16)")
    parser.add_argument("--pipeline", action="store_true", help="measure MetaMorphPipeline instead")
    parser.add_argument(
        "--cpu-time", action="store_true", help="with --pipeline: count CPU time (busy machine); set OMP_NUM_THREADS=1"
    )
    parser.add_argument("--denoising-steps", type=int, default=10, help="with --pipeline (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each timing (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true", help="also time compiled steps (one or two minutes more)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda, but torch finds no GPU here.")

    torch.manual_seed(0)
    results = measure_pipeline(args) if args.pipeline else measure(args)
    for name, value in results.items():
        print(f"{name:<62} {value:10.3f}")
    measured = {"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}
    print(json.dumps(measured))
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
