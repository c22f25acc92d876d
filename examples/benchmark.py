"""Measure generation against the bare language model and against decoding as the released code does it.

    python examples/benchmark.py                    # a small model, two minutes on 2 CPU cores
    python examples/benchmark.py --pipeline         # the emoji pipeline instead, against Stable Diffusion's; a minute
    python examples/benchmark.py --hidden 1024 --layers 16 --device cuda --dtype bfloat16 --compile

The weights are random, because speed does not depend on them. The two sides of a ratio are timed in turns in this
process where they take about as long, so that a noisy machine disturbs both. The median of `--repeats` times counts,
or of three times as many for ratios near 1. The last line of the output is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import EMOJI_CHECKPOINT, load_pipeline
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, SiglipVisionConfig

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration


PROMPTS = [f"a {color} {thing}" for color in ("red", "blue", "tiny", "huge") for thing in ("cat", "dog", "car", "hat")]


def build_model(args: argparse.Namespace, visual_decoding: str) -> MetaMorphForConditionalGeneration:
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
        visual_decoding=visual_decoding,
    )
    return MetaMorphForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype)).eval()


class Timer:
    """Times functions in turns, on the device `device`."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats

    def __call__(self, *runs: Callable[[], object]) -> list[float]:
        """Return the median seconds of each function."""
        for run in (*runs, *runs):  # warm-up, also of the allocator
            run()
        rounds = [[self.time(run) for run in runs] for _ in range(self.repeats)]
        return [statistics.median(seconds) for seconds in zip(*rounds)]

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds that a function takes."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


@torch.no_grad()
def run_released_step(model: MetaMorphForConditionalGeneration, length: int) -> None:
    """Run a visual step as the released code does: the whole sequence again, and logits of all of its positions."""
    embeds = torch.randn(1, length, model.config.text_config.hidden_size).to(model.device, model.dtype)
    hidden_states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    embed = model.model.projector(F.normalize(model.vision_head(hidden_states[:, -1:]), dim=-1))
    model.lm_head(torch.cat([hidden_states[:, :-1], embed], dim=1)).float()


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


def train_on_images(model, batch: int, length: int) -> Callable[[], object]:
    """Take a training step, without the optimizer, on prompts that are answered with an image each."""
    config, inputs = model.config, make_prompt(model, batch, length)
    image = [config.image_token_id] * config.num_image_tokens
    image = torch.tensor([config.image_start_token_id, *image, config.image_end_token_id], device=model.device)
    answer = image.expand(batch, -1)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], dim=1)
    tokens = torch.randn(batch, config.num_image_tokens, config.visual_token_dim).to(model.device, model.dtype)
    model.train()
    return lambda: model(input_ids=ids, labels=labels, visual_tokens=tokens, use_cache=False).loss.backward()


def measure_generation(args: argparse.Namespace) -> dict[str, float]:
    timer, results = Timer(args.device, args.repeats), {}
    model, parallel = (build_model(args, visual_decoding) for visual_decoding in ("autoregressive", "parallel"))
    steps, length = args.visual_tokens, args.prompts[0]
    with torch.device("meta"):  # the bare language model shares the weights
        llm = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    llm.model, llm.lm_head = model.model.language_model, model.lm_head
    inputs, count = make_prompt(model, 1, length), steps + 2  # room for an image
    rows = [
        (f"visual steps / text steps of the bare LLM, prompt {length}", generate_image(model, 1, length), steps + 1),
        ("the same with parallel decoding", generate_image(parallel, 1, length), steps + 1),
        ("text-only generate / bare LLM", write_text(model, inputs, count), count),
        ("text-only generate with max_images=0 / bare LLM", write_text(model, inputs, count, max_images=0), count),
    ]
    bare, *ours = Timer(args.device, 3 * args.repeats)(write_text(llm, inputs, count), *(run for _, run, _ in rows))
    for (name, _, tokens), seconds in zip(rows, ours):
        results[name] = (seconds / tokens) / (bare / count)

    for prompt in args.prompts:
        ours, in_one_pass = timer(generate_image(model, 1, prompt), generate_image(parallel, 1, prompt))
        # Four steps of the released loop, evenly spread over the image, stand for all.
        lengths = [prompt + round((number + 0.5) * steps / 4) for number in range(4)]
        released = Timer(args.device, 1)(*(partial(run_released_step, model, current) for current in lengths))
        for name, seconds in (("ours", ours), ("parallel decoding", in_one_pass)):
            results[f"released loop / {name}, batch 1, prompt {prompt}"] = sum(released) * steps / 4 / seconds

    static = {"cache_implementation": "static", "disable_compile": True}
    rows = [
        ("batch 4", generate_image(model, 4, length), 4),
        ("batch 16", generate_image(model, 16, length), 16),
        ("batch 16, static cache", generate_image(model, 16, length, **static), 16),
        ("batch 1, static cache", generate_image(model, 1, length, **static), 1),
        ("batch 16, parallel decoding", generate_image(parallel, 16, length), 16),
    ]
    if args.compile:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # otherwise transformers compiles on accelerators only
        compiled = {"cache_implementation": "static", "compile_config": compile_config}
        rows.append(("batch 1, static cache and compiled", generate_image(model, 1, length, **compiled), 1))
    one, *others = timer(generate_image(model, 1, length), *(run for _, run, _ in rows))
    results["images per second, batch 1"] = 1 / one
    for (name, _, images), seconds in zip(rows, others):
        results[f"images per second, {name} / batch 1"] = images * one / seconds
    name = "images per second, batch 16{} / batch 1"
    ratio = results[name.format(", parallel decoding")] / results[name.format("")]
    results["images per second, batch 16, parallel / autoregressive"] = ratio

    models = (model, parallel)
    seconds = Timer(args.device, 3 * args.repeats)(*(train_on_images(each, 4, length) for each in models))
    results["training step, parallel / autoregressive"] = seconds[1] / seconds[0]

    statements = ("import metamorph_hf", "from transformers import LlamaForCausalLM")
    commands = [[sys.executable, "-c", statement] for statement in statements]
    ours, theirs = Timer("cpu", 1)(*(partial(subprocess.run, command, check=True) for command in commands))
    return {**results, "import metamorph_hf / import LlamaForCausalLM": ours / theirs}


@torch.no_grad()
def measure_pipeline(args: argparse.Namespace) -> dict[str, float]:
    timer, results = Timer(args.device, args.repeats), {}
    pipe = load_pipeline(EMOJI_CHECKPOINT, args.device).to(getattr(torch, args.dtype))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=pipe.unet.config.in_channels,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
    shared = {"unet": pipe.unet, "vae": vae.eval().to(pipe.device, pipe.dtype), "scheduler": scheduler}
    ours = type(pipe)(**{**pipe.components, **shared})
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    stable = StableDiffusionPipeline(**shared, **absent, requires_safety_checker=False)
    for pipeline in (pipe, ours, stable):
        pipeline.set_progress_bar_config(disable=True)

    config = pipe.model.config
    tokens = torch.randn(4, config.num_image_tokens, config.visual_token_dim).to(pipe.device, pipe.dtype)
    states = pipe.projector(tokens)
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": torch.zeros_like(states)}
    for guidance in (1.0, 7.5):
        options = {"num_inference_steps": args.denoising_steps, "guidance_scale": guidance, "output_type": "pt"}
        seconds = timer(partial(ours.decode_visual_tokens, tokens, **options), partial(stable, **embeds, **options))
        results[f"decoding 4 images / StableDiffusionPipeline, guidance {guidance}"] = seconds[0] / seconds[1]

    options = {"num_inference_steps": args.denoising_steps, "max_new_tokens": config.num_image_tokens + 2}
    options["generation_kwargs"] = {"force_image": True, "max_images": 1}
    together, alone = timer(lambda: pipe(PROMPTS, **options), lambda: [pipe(prompt, **options) for prompt in PROMPTS])
    return results | {"16 prompts in one call / in 16 calls": together / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, help_text in (
        ("--hidden", 512, "width of the language model"),
        ("--layers", 8, "layers of the language model"),
        ("--vocabulary", 32000, "size of the vocabulary"),
        ("--visual-tokens", 64, "visual tokens per image"),
        ("--denoising-steps", 10, "denoising steps with --pipeline"),
        ("--repeats", 3, "repetitions of each timing"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{help_text} (default: {default})")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048], help="lengths (default: 128 2048)")
    parser.add_argument("--pipeline", action="store_true", help="measure MetaMorphPipeline instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the weights (default: float32)")
    parser.add_argument("--compile", action="store_true", help="also time compiled steps (one or two minutes more)")
    args = parser.parse_args()
    args.tower_hidden, args.tower_layers = 64, 1  # generation does not use the vision tower

    torch.manual_seed(0)
    results = measure_pipeline(args) if args.pipeline else measure_generation(args)
    for name, value in results.items():
        print(f"{name:<62} {value:10.3f}")
    print(json.dumps({"settings": vars(args), "results": results}))


if __name__ == "__main__":
    main()
