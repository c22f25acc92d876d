"""Measure generation against the bare language model and against decoding as the released code does it.

    python examples/benchmark.py                    # a small model, two minutes on 2 CPU cores
    python examples/benchmark.py --pipeline         # the pipeline instead, against Stable Diffusion's; a minute
    python examples/benchmark.py --hidden 1024 --layers 16 --device cuda --dtype bfloat16 --compile --json result.json

All weights are random: speed does not depend on what they say. Ratios are of things timed in this process, in turns
where they take alike, so that a noisy machine disturbs both; the middle one of `--repeats` times counts, or of three
times as many where the two are nearly alike.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, SiglipVisionConfig

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_model(args: argparse.Namespace) -> MetaMorphForConditionalGeneration:
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


def bare_language_model(model: MetaMorphForConditionalGeneration):
    """The same language model without MetaMorph, its weights shared."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(model.config.text_config)
    llm.model, llm.lm_head = model.model.language_model, model.lm_head
    return llm.eval()


@torch.no_grad()
def released_loop_step(model: MetaMorphForConditionalGeneration, embeds: torch.Tensor) -> torch.Tensor:
    """One visual step as the released code takes it: the whole sequence anew, and logits of all of its positions."""
    hidden_states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    token = F.normalize(model.vision_head(hidden_states[:, -1:]), dim=-1)
    embed = model.model.projector(token)
    model.lm_head(torch.cat([hidden_states[:, :-1], embed], dim=1)).float()
    return torch.cat([embeds, embed], dim=1)


class Timer:
    """Times things in turns."""

    def __init__(self, device: str, repeats: int, clock: Callable[[], float] = time.perf_counter):
        self.device, self.repeats, self.clock = device, repeats, clock

    def __call__(self, *runs: Callable[[], object]) -> list[float]:
        """The median seconds of each."""
        for run in (*runs, *runs):  # warm-up, of the allocator, too
            run()
        times = [[] for _ in runs]
        for _ in range(self.repeats):
            for run, seconds in zip(runs, times):
                self.wait()
                start = self.clock()
                run()
                self.wait()
                seconds.append(self.clock() - start)
        return [statistics.median(seconds) for seconds in times]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def released_seconds(model, length: int, steps: int, timer: Timer, sampled: int = 4) -> float:
    """What `steps` visual steps of the released loop take after a prompt: some of them, spread evenly, are timed."""
    lengths = [length + round((n + 0.5) * steps / sampled) for n in range(sampled)]
    embeds = [torch.randn(1, n, model.config.text_config.hidden_size).to(model.device, model.dtype) for n in lengths]
    quick = Timer(timer.device, 1)
    return sum(quick(lambda e=e: released_loop_step(model, e))[0] for e in embeds) * steps / sampled


def import_seconds(statement: str, repeats: int = 2) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    model, timer = build_model(args), Timer(args.device, args.repeats)
    often = Timer(args.device, 3 * args.repeats)  # for ratios near 1
    llm, steps, config = bare_language_model(model), args.visual_tokens, model.config
    results = {}

    def prompt(batch: int, length: int, image: bool = False) -> dict[str, torch.Tensor]:
        ids = torch.randint(10, args.vocabulary - 10, (batch, length), device=args.device)
        if image:
            ids[:, -1] = config.image_start_token_id
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def text(model, inputs, count, **kwargs):
        return lambda: model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **kwargs)

    def draw(inputs, **kwargs):  # an image and its <image_end>: N + 1 steps
        return lambda: model.generate(**inputs, max_new_tokens=steps, do_sample=False, **kwargs)

    progress = tqdm(total=3 + len(args.prompts) + len(args.images) + args.compile, desc="benchmark")

    inputs, image = prompt(1, args.prompts[0]), prompt(1, args.prompts[0], image=True)
    drawing, ours, off, bare = often(
        draw(image),
        text(model, inputs, steps + 1),
        text(model, inputs, steps + 1, max_images=0),
        text(llm, inputs, steps + 1),
    )
    results[f"visual steps / text steps of the bare LLM, prompt {args.prompts[0]}"] = drawing / bare
    results["text-only generate / bare LLM"] = ours / bare
    results["text-only generate with max_images=0 / bare LLM"] = off / bare
    progress.update()

    for length in args.prompts:
        (ours,) = timer(draw(prompt(1, length, image=True)))
        results[f"released loop / ours, batch 1, prompt {length}"] = (
            released_seconds(model, length, steps, timer) / ours
        )
        progress.update()

    static = {"cache_implementation": "static", "disable_compile": True}
    many = prompt(16, args.prompts[0], image=True)
    one, four, sixteen, fixed = timer(
        draw(image), draw(prompt(4, args.prompts[0], image=True)), draw(many), draw(many, **static)
    )
    results["images per second, batch 1"] = 1 / one
    results["images per second, batch 4 / batch 1"] = 4 * one / four
    results["images per second, batch 16 / batch 1"] = 16 * one / sixteen
    results["images per second, batch 16, static cache / batch 1"] = 16 * one / fixed
    progress.update()

    for count in args.images:
        pixels = torch.randn(count, 3, 224, 224).to(args.device, model.dtype)
        picture = [config.image_start_token_id, *[config.image_token_id] * steps, config.image_end_token_id]
        asked = prompt(1, 128)["input_ids"]
        ids = torch.cat([torch.tensor([picture * count], device=args.device), asked], dim=1)
        seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens = model.get_visual_tokens(pixels)
        encode, reuse = timer(
            text(model, {**seen, "pixel_values": pixels}, 1), text(model, {**seen, "visual_tokens": tokens}, 1)
        )
        results[f"prefill with {count} images, seconds"] = encode
        results[f"the same from visual_tokens / from pixels, {count} images"] = reuse / encode
        progress.update()

    if args.compile:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # else transformers compiles on accelerators only
        dynamic, eager, compiled = timer(
            draw(image),
            draw(image, **static),
            draw(image, cache_implementation="static", compile_config=compile_config),
        )
        results["visual steps, static cache / dynamic"] = eager / dynamic
        results["visual steps, static cache and compiled / dynamic"] = compiled / dynamic
        progress.update()

    ours = import_seconds("import metamorph_hf")
    results["import metamorph_hf / import LlamaForCausalLM"] = ours / import_seconds(
        "from transformers import LlamaForCausalLM"
    )
    progress.update()
    progress.close()
    # A process' maximum cannot be taken back, so this is that of the whole run.
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else maximum_resident_bytes()
    results["peak memory, MB"] = peak / 1e6
    return results


PROMPTS = [
    f"a {colour} {thing}" for colour in ("red", "blue", "tiny", "huge") for thing in ("cat", "dog", "car", "hat")
]


def build_pipeline(args: argparse.Namespace, widths: tuple[int, int], latent_size: int):
    """Of random weights, with a language model of hidden 64; `widths` are those of the U-Net's blocks."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from metamorph_hf import MetaMorphPipeline, MetaMorphProcessor, VisualTokenProjector

    processor = MetaMorphProcessor.from_pretrained(Path(__file__).parent / "emoji" / "checkpoint" / "processor")
    tokenizer = processor.tokenizer
    size = processor.image_processor.size["height"]
    start, end, image = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<image_start>", "<image_end>", processor.image_token)
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 8,
        vision_use_head=False,
    )
    model = MetaMorphForConditionalGeneration(
        MetaMorphConfig(
            text_config=text_config,
            vision_config=vision_config,
            num_image_tokens=processor.num_image_tokens,
            image_token_id=image,
            image_start_token_id=start,
            image_end_token_id=end,
        )
    )
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

    torch.manual_seed(0)
    timer = Timer(args.device, args.repeats, time.process_time if args.cpu_time else time.perf_counter)
    steps, results = args.painting_steps, {}
    progress = tqdm(total=3, desc="benchmark")

    pipe = build_pipeline(args, widths=(64, 128), latent_size=16)
    stable = StableDiffusionPipeline(
        **{name: getattr(pipe, name) for name in ("unet", "vae", "scheduler")},
        **{name: None for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")},
        requires_safety_checker=False,
    )
    stable.set_progress_bar_config(disable=True)
    for guidance in (1.0, 7.5):
        tokens = torch.randn(4, pipe.projector.config.num_image_tokens, 64).to(args.device, pipe.dtype)
        states = pipe.projector(tokens)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        embeds = {"prompt_embeds": states, "negative_prompt_embeds": torch.zeros_like(states)}
        ours, theirs = timer(
            lambda t=tokens, o=options: pipe.decode_visual_tokens(t, **o),
            lambda e=embeds, o=options: stable(**e, **o),
        )
        results[f"painting 4 pictures / StableDiffusionPipeline, guidance {guidance}"] = ours / theirs
        progress.update()

    pipe = build_pipeline(args, widths=(16, 32), latent_size=8)
    options = {"num_inference_steps": steps, "generation_kwargs": {"force_image": True, "max_images": 1}}
    options["max_new_tokens"] = pipe.processor.num_image_tokens
    together, alone = timer(lambda: pipe(PROMPTS, **options), lambda: [pipe(prompt, **options) for prompt in PROMPTS])
    results["16 prompts in one call / in 16 calls"] = together / alone
    progress.update()
    progress.close()
    return results


def maximum_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="its vocabulary (default: 32000)")
    parser.add_argument("--visual-tokens", type=int, default=64, help="per image (default: 64)")
    parser.add_argument("--tower-hidden", type=int, default=192, help="width of the vision tower (default: 192)")
    parser.add_argument("--tower-layers", type=int, default=4, help="its layers (default: 4)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048], help="lengths (default: 128 2048)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16], help="in a prompt (default: 1 16)")
    parser.add_argument("--pipeline", action="store_true", help="measure MetaMorphPipeline, instead of all the above")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --pipeline: count this process' time on the CPU, for a busy machine; set OMP_NUM_THREADS=1",
    )
    parser.add_argument("--painting-steps", type=int, default=10, help="with --pipeline (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="times each thing is timed (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile", action="store_true", help="also the step compiled, with a static cache (a minute more, or two)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda was asked for, but torch sees no GPU here.")

    results = measure_pipeline(args) if args.pipeline else measure(args)
    for name, value in results.items():
        print(f"{name:<62} {value:10.3f}")
    measured = {"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}
    print(json.dumps(measured))
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
