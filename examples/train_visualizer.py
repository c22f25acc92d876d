"""Train what paints: a projector, and a latent-diffusion U-Net that attends to visual tokens in the place of text.

    python examples/train_visualizer.py pictures/ --model my-metamorph \\
        --base stable-diffusion-v1-5/stable-diffusion-v1-5 --output my-pipeline

VAE and vision tower stay as they are. Started again, it goes on from its last checkpoint: neither pictures nor noise
are repeated or left out. On several devices: accelerate launch examples/train_visualizer.py ...
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from datasets import Array2D, Dataset, Features, Image, load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphPipeline, MetaMorphProcessor, VisualTokenProjector
from metamorph_hf.image_reading import read_image


class Painter(nn.Module):
    """Projector and U-Net as one module, so that one call of it is one of DDP's."""

    def __init__(self, projector: VisualTokenProjector, unet: nn.Module):
        super().__init__()
        self.projector, self.unet = projector, unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, visual_tokens: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents (I, C, h, w), visual tokens (I, N, V) and a mask (I,) of those that are not dropped."""
        states = self.projector(visual_tokens, kept)
        return self.unet(noisy, timesteps, encoder_hidden_states=states).sample


def diffusion_loss(
    predict,
    scheduler: SchedulerMixin,
    clean: torch.Tensor,
    generator: torch.Generator,
    noise_offset: float = 0.0,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """
    Mean squared error on the noise, or on what else the scheduler's `prediction_type` names.

    Args:
        predict (`Callable`): Gives the U-Net's output (I, C, h, w) for noisy latents and timesteps (I,).
        scheduler: With `add_noise` and, for v-prediction, `get_velocity`.
        clean (`torch.Tensor` of shape (I, C, h, w)): Latents of unit variance.
        generator: Of noise and timesteps, on the CPU: the same on every device.
        noise_offset (`float`): Share of noise that is one number per channel, for darker and lighter pictures.
        snr_gamma (`float`, *optional*): Min-SNR weighting (arXiv 2303.09556); the paper's value is 5.
    """
    count, steps = len(clean), scheduler.config.num_train_timesteps
    # Evenly spread over the batch, so that its loss does not depend on luck with the noise levels.
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread * steps).long().to(clean.device)
    noise = torch.randn(clean.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
    noise = noise.to(clean)
    prediction = predict(scheduler.add_noise(clean, noise, timesteps), timesteps)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": clean}[prediction_type]
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=snr_gamma)
        loss = loss * {"epsilon": weight / snr, "v_prediction": weight / (snr + 1), "sample": weight}[prediction_type]
    return loss.mean()


def open_pictures(path: str, split: str, column: str | None) -> Dataset:
    """A folder of pictures, a parquet file, a webdataset's tar files, or a dataset of the Hub: its column `image`."""
    if path.endswith(".tar") or next(Path(path).glob("*.tar"), None) is not None:
        files = path if path.endswith(".tar") else f"{path}/*.tar"
        dataset = load_dataset("webdataset", data_files=files, split=split)
    elif Path(path).is_dir():
        dataset = load_dataset("imagefolder", data_dir=path, split=split)
    elif Path(path).is_file():
        dataset = load_dataset("parquet", data_files=path, split=split)
    else:
        dataset = load_dataset(path, split=split)
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if column is None and len(pictures) == 1:
        (column,) = pictures  # a webdataset's is named after the files' ending
    column = column or "image"
    if column not in dataset.column_names:
        raise SystemExit(
            f"{path} has no column {column}: name one of {', '.join(dataset.column_names)} with --image-column."
        )
    dataset = dataset.select_columns([column])
    return dataset.rename_column(column, "image") if column != "image" else dataset


def to_pixels(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """Centre square of a picture, resized; (3, size, size) in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), PIL.Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Collate:
    """Pictures to what the VAE and the vision tower take. The released code shows both the same centre square."""

    def __init__(self, processor: MetaMorphProcessor, size: int):
        self.processor, self.size = processor, size

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [read_image(row["image"]) for row in rows]
        batch = {"pixels": torch.stack([to_pixels(image, self.size) for image in images])}
        if "visual_tokens" in rows[0]:
            return {**batch, "visual_tokens": torch.tensor(np.array([row["visual_tokens"] for row in rows]))}
        squares = [image.crop(_centre(image)) for image in images]
        return {**batch, **self.processor.image_processor(squares, return_tensors="pt")}


def _centre(image: PIL.Image.Image) -> tuple[int, int, int, int]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def cache_visual_tokens(dataset: Dataset, model: MetaMorphForConditionalGeneration, collate: Collate) -> Dataset:
    """The dataset with a column `visual_tokens` on disk; the tower then need not run."""
    shape = (model.config.num_image_tokens, model.config.visual_token_dim)

    @torch.no_grad()
    def encode(columns: dict[str, list]) -> dict[str, list]:
        pixels = collate([{"image": image} for image in columns["image"]])["pixel_values"]
        return {"visual_tokens": list(model.get_visual_tokens(pixels.to(model.device)).float().cpu().numpy())}

    features = Features({**dataset.features, "visual_tokens": Array2D(shape, "float32")})
    return dataset.map(encode, batched=True, batch_size=32, features=features, desc="Visual tokens")


def build(args: argparse.Namespace) -> MetaMorphPipeline:
    """The base's U-Net, VAE and scheduler with the model, and a projector: the base's, or a new one."""
    pipeline = (Path(args.model) / "model_index.json").is_file()
    model = MetaMorphForConditionalGeneration.from_pretrained(
        f"{args.model}/model" if pipeline else args.model, dtype="auto"
    ).eval()
    processor = MetaMorphProcessor.from_pretrained(f"{args.model}/processor" if pipeline else args.model)
    base = DiffusionPipeline.from_pretrained(args.base)
    projector = base.components.get("projector")
    if projector is None:
        padded = None if args.pad_to == 0 else args.pad_to
        projector = VisualTokenProjector(
            visual_token_dim=model.config.visual_token_dim,
            cross_attention_dim=base.unet.config.cross_attention_dim,
            projector_type=args.projector_type,
            num_layers=args.projector_layers,
            hidden_dim=args.projector_width,
            num_image_tokens=model.config.num_image_tokens,
            sequence_length=padded,
            num_queries=None if args.projector_type == "mlp" else padded or model.config.num_image_tokens,
            learned_unconditional=args.learned_unconditional,
        )
    elif args.learned_unconditional and projector.unconditional is None:
        trained = projector.state_dict()
        projector = VisualTokenProjector.from_config(projector.config, learned_unconditional=True)
        projector.load_state_dict({"unconditional": projector.unconditional, **trained})
    options = ("default_guidance_scale", "default_num_inference_steps", "instruction_template")
    config = {name: base.config[name] for name in options if name in base.config}
    if pipeline:  # how captions are put is what the model was trained on
        stored = json.loads((Path(args.model) / "model_index.json").read_text())
        if "instruction_template" in stored:
            config["instruction_template"] = stored["instruction_template"]
    return MetaMorphPipeline(
        model=model,
        processor=processor,
        projector=projector,
        unet=base.unet,
        vae=base.vae,
        scheduler=base.scheduler,
        **config,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was saved to its end."""
    complete = [path.parent for path in folder.glob("checkpoint-[0-9]*/step.json")]
    return max(complete, key=lambda path: int(path.name.rsplit("-")[-1]), default=None)


@torch.no_grad()
def validate(pipe: MetaMorphPipeline, pictures: list[PIL.Image.Image], args: argparse.Namespace) -> PIL.Image.Image:
    """A row a picture: the original, then its reconstruction at each guidance scale."""
    generator = [torch.Generator().manual_seed(args.seed) for _ in pictures]
    options = {"guidance_scale": args.guidance_scales, "num_inference_steps": args.validation_steps}
    painted = pipe.reconstruct([image.crop(_centre(image)) for image in pictures], generator=generator, **options)
    size, scales = painted[0].size, len(args.guidance_scales)
    cells = []
    for place, image in enumerate(pictures):
        cells += [image.crop(_centre(image)).resize(size), *painted[place * scales : (place + 1) * scales]]
    return make_image_grid(cells, rows=len(pictures), cols=1 + scales)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pictures",
        help="folder of pictures, parquet file, webdataset (a tar or a folder of them), or Hub dataset",
    )
    parser.add_argument("--split", default="train", help="of a dataset (default: train)")
    parser.add_argument("--image-column", help="of a dataset (default: the one with pictures, or image)")
    parser.add_argument("--model", required=True, help="MetaMorph whose vision tower sees the pictures")
    parser.add_argument("--base", required=True, help="pipeline with a U-Net, such as Stable Diffusion 1.5")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the pipeline")
    parser.add_argument("--unet", choices=("full", "lora", "frozen"), default="full", help="what of it is trained")
    parser.add_argument("--lora-rank", type=int, default=64, help="with --unet lora (default: 64)")
    parser.add_argument("--projector-type", choices=("mlp", "xattn", "xattnffn", "transformer"), default="mlp")
    parser.add_argument("--projector-layers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--projector-width", type=int, default=2048, help="hidden width (default: 2048)")
    parser.add_argument("--pad-to", type=int, default=77, help="states the base is used to; 0 for no padding")
    parser.add_argument("--size", type=int, help="of the pictures in pixels (default: what the U-Net is made for)")
    parser.add_argument("--batch-size", type=int, default=24, help="per device (default: 24)")
    parser.add_argument("--accumulation", type=int, default=1, help="batches per update (default: 1)")
    parser.add_argument("--steps", type=int, default=16000, help="updates (default: 16000)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="(default: 1e-5)")
    parser.add_argument("--schedule", default="linear", help="of the learning rate, as diffusers names it")
    parser.add_argument("--warmup", type=int, default=4000, help="updates (default: 4000)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="(default: 0.01)")
    parser.add_argument(
        "--conditioning-dropout",
        type=float,
        default=0.7,
        help="share of pictures painted from nothing (default: 0.7). The authors advise more than 0.7: the U-Net must "
        "unlearn text, and guidance needs a good unconditional prediction",
    )
    parser.add_argument(
        "--learned-unconditional",
        action="store_true",
        help="learn what the U-Net attends to for those pictures, instead of zeros",
    )
    parser.add_argument("--noise-offset", type=float, default=0.0)
    parser.add_argument("--snr-gamma", type=float, help="min-SNR weighting; 5 is usual (default: none)")
    parser.add_argument("--ema", action="store_true", help="keep and save a moving average of the weights")
    parser.add_argument("--use-8bit-adam", action="store_true", help="bitsandbytes' AdamW, on a GPU")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--cache", action="store_true", help="encode all pictures first, and leave out the tower")
    parser.add_argument("--workers", type=int, default=0, help="that read pictures (default: 0)")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="updates; the last two are kept")
    parser.add_argument("--validation-every", type=int, default=0, help="updates; 0 for never")
    parser.add_argument("--validation-pictures", type=int, default=4, help="the first of the dataset (default: 4)")
    parser.add_argument("--validation-steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[6.0, 7.5, 10.0, 12.5])
    parser.add_argument("--report-to", help="tracker of accelerate: tensorboard, wandb, trackio...")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        # Counted on over the ends of epochs, as the number of batches is that a resumed run begins with.
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulation, sync_with_dataloader=False),
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        cpu=args.cpu,
        project_config=ProjectConfiguration(project_dir=str(args.output), logging_dir=str(args.output / "logs")),
    )
    set_seed(args.seed)
    pipe = build(args)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.model, pipe.vae, pipe.unet):
        part.requires_grad_(False).to(accelerator.device)
    if args.unet == "full":
        pipe.unet.requires_grad_(True)
    elif args.unet == "lora":
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=targets))
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    painter = Painter(pipe.projector, pipe.unet).train()
    trained = [parameter for parameter in painter.parameters() if parameter.requires_grad]

    size = args.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    dataset, collate = open_pictures(args.pictures, args.split, args.image_column), Collate(pipe.processor, size)
    shown = [read_image(dataset[place]["image"]) for place in range(min(args.validation_pictures, len(dataset)))]
    if args.cache:
        with accelerator.main_process_first():  # the others then read what it cached
            dataset = cache_visual_tokens(dataset, pipe.model, collate)
    order = torch.Generator()
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, generator=order),
        collate_fn=collate,
        num_workers=args.workers,
        drop_last=len(dataset) >= args.batch_size * accelerator.num_processes,
    )

    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    optimizer = optimizer_class(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_scheduler(
        args.schedule,
        optimizer,
        num_warmup_steps=args.warmup * accelerator.num_processes,  # accelerate steps it once per process
        num_training_steps=args.steps * accelerator.num_processes,
    )
    painter, optimizer, loader, schedule = accelerator.prepare(painter, optimizer, loader, schedule)
    ema = EMAModel(trained) if args.ema else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
        ema.to(accelerator.device)
    noise_scheduler = pipe.scheduler
    if "prediction_type" not in noise_scheduler.config or "add_noise" not in dir(noise_scheduler):
        noise_scheduler = DDPMScheduler.from_config(noise_scheduler.config)

    step, saved, loss = 0, last_checkpoint(args.output), None
    if saved is not None:
        accelerator.load_state(str(saved))
        step = json.loads((saved / "step.json").read_text())["step"]
        accelerator.print(f"going on from {saved}")
    if args.report_to is not None:
        accelerator.init_trackers("visualizer", {k: str(v) for k, v in vars(args).items()})

    batches_per_epoch = len(loader)
    batch_number = step * args.accumulation
    progress = tqdm(total=args.steps, initial=step, desc="visualizer", disable=not accelerator.is_main_process)
    while step < args.steps:
        epoch, place = divmod(batch_number, batches_per_epoch)
        order.manual_seed(args.seed + epoch)
        epoch_loader = accelerator.skip_first_batches(loader, place) if place else loader
        for batch in epoch_loader:
            # From the batch's number alone, so that resuming changes nothing.
            source = batch_number * accelerator.num_processes + accelerator.process_index
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + source)
            with accelerator.accumulate(painter):
                with torch.no_grad():
                    clean = pipe.vae.encode(batch["pixels"].to(pipe.vae.dtype)).latent_dist.mode()
                    clean = clean * pipe.vae.config.scaling_factor
                    tokens = batch.get("visual_tokens")
                    tokens = pipe.model.get_visual_tokens(batch["pixel_values"]) if tokens is None else tokens
                kept = (torch.rand(len(clean), generator=generator) >= args.conditioning_dropout).to(clean.device)
                loss = diffusion_loss(
                    partial(painter, visual_tokens=tokens.float(), kept=kept),
                    noise_scheduler,
                    clean.float(),
                    generator,
                    args.noise_offset,
                    args.snr_gamma,
                )
                if not torch.isfinite(loss):
                    raise SystemExit(f"The loss is {loss.item()} in step {step + 1}: lower the learning rate.")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            batch_number += 1
            if batch_number % args.accumulation:
                continue
            step += 1
            progress.update()
            if ema is not None:
                ema.step(trained)
            if step % 10 == 0 or step == args.steps:
                mean = accelerator.gather(loss.detach()).mean().item()
                progress.set_postfix(loss=f"{mean:.4f}")
                accelerator.log({"loss": mean, "learning_rate": schedule.get_last_lr()[0]}, step=step)
            if step % args.checkpoint_every == 0 or step == args.steps:
                save_checkpoint(accelerator, args.output, step)
            if args.validation_every and step % args.validation_every == 0 and accelerator.is_main_process:
                grid = validate(pipe, shown, args)
                (args.output / "validation").mkdir(parents=True, exist_ok=True)
                grid.save(args.output / "validation" / f"step-{step:06}.png")
                for tracker in accelerator.trackers:
                    if tracker.name == "tensorboard":
                        images = {"validation": np.asarray(grid)[None]}
                        tracker.log_images(images, step=step, dataformats="NHWC")
                    elif tracker.name == "wandb":
                        tracker.log_images({"validation": [grid]}, step=step)
            if step == args.steps:
                break
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(trained)
        if args.unet == "lora":
            pipe.unet.save_lora_adapter(args.output / "unet_lora")
            pipe.unet.fuse_lora()
            pipe.unet.unload_lora()
        pipe.unet.requires_grad_(False)
        pipe.save_pretrained(args.output)
        save_card(pipe, shown, args)
        print(f"saved {args.output}, " + ("nothing left to train" if loss is None else f"loss {loss.item():.4f}"))
    accelerator.end_training()


def save_card(pipe: MetaMorphPipeline, pictures: list[PIL.Image.Image], args: argparse.Namespace) -> None:
    """README.md in the pipeline's folder: how it was trained, and what it makes of pictures."""
    grid = ""
    if pictures:
        validate(pipe, pictures, args).save(args.output / "reconstructions.png")
        scales = ", ".join(f"{scale:g}" for scale in args.guidance_scales)
        grid = "![reconstructions](reconstructions.png)\n\n"
        grid += f"*Originals, and reconstructions with guidance {scales}.*\n\n"
    told = ("unet", "steps", "batch_size", "accumulation", "learning_rate", "conditioning_dropout", "seed")
    rows = [f"| {name.replace('_', ' ')} | {getattr(args, name)} |" for name in told]
    description = grid + "\n".join(["## Training", "", "| what | value |", "|---|---|", *rows])
    # A folder of this machine is nobody's business.
    base = None if Path(args.base).exists() else args.base
    pipe.create_model_card(args.output.name, description, base).save(args.output / "README.md")


def save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Whole or not at all: step.json comes last. Older ones than the last two go."""
    folder = output / f"checkpoint-{step}"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "step.json").write_text(json.dumps({"step": step}))
        steps = sorted(int(path.name.rsplit("-")[-1]) for path in output.glob("checkpoint-[0-9]*"))
        for old in steps[:-2]:
            shutil.rmtree(output / f"checkpoint-{old}")


if __name__ == "__main__":
    main()
