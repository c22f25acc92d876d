"""Train a visualizer: a projector and a latent diffusion U-Net that attends to visual tokens instead of text.

    python examples/train_visualizer.py images/ --model my-metamorph \\
        --base stable-diffusion-v1-5/stable-diffusion-v1-5 --output my-pipeline

VAE and vision tower stay frozen. When started again, training continues from its last complete checkpoint, and neither
repeats nor skips an image; `--overwrite` starts anew.
On several devices: accelerate launch examples/train_visualizer.py ...
"""

import argparse
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from common import exit_with_sentence, find_pipeline, resolve_model
from datasets import Array2D, Dataset, Features, Image, load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from peft import LoraConfig
from PIL.ImageOps import fit
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from trl.trainer.utils import hash_module

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphPipeline, MetaMorphProcessor, VisualTokenProjector
from metamorph_hf.data.mixture import cache_options
from metamorph_hf.image_reading import read_image
from metamorph_hf.visualizer_training import ConditionedUNet, diffusion_loss, save_ema_with
from metamorph_hf.vpit.checkpoints import find_checkpoints


# Settings that do not change what is learned, so that a run may continue with others.
FREE_SETTINGS = {"output", "overwrite", "steps", "checkpoint_every", "report_to", "cpu", "workers", "cache"}
FREE_SETTINGS |= {"validation_every", "validation_images", "validation_steps", "guidance_scales"}
FREE_SETTINGS |= {"gradient_checkpointing", "mixed_precision"}


def parse_args() -> argparse.Namespace:
    class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:  # "(default: None)" tells nothing
            return action.help if action.default is None else super()._get_help_string(action)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("images", help="folder of images, parquet file, webdataset (a tar file or a folder of them), or Hub dataset")
    add("--split", default="train", help="split of the dataset")
    add("--image-column", help="column of the dataset (default: its only image column, or `image`)")
    add("--model", required=True, help="MetaMorph whose vision tower encodes the images")
    add("--base", required=True, help="pipeline with a U-Net, such as Stable Diffusion 1.5")
    add("--output", required=True, type=Path, help="folder for checkpoints and the trained pipeline")
    add("--overwrite", action="store_true", help="start anew in a folder that is not empty; delete its checkpoints")
    add("--unet", choices=("full", "lora", "frozen"), default="full", help="which U-Net weights are trained")
    add("--lora-rank", type=int, default=64, help="rank of the adapters with --unet lora")
    add("--projector-type", choices=("mlp", "xattn", "xattnffn", "transformer"), default="mlp", help="architecture")
    add("--projector-layers", type=int, default=2, help="number of layers of the projector")
    add("--projector-width", type=int, default=2048, help="hidden width of the projector")
    add("--pad-to", type=int, default=77, help="number of states that the base was trained with; 0 disables padding")
    add("--size", type=int, help="size of the images in pixels (default: that of the U-Net)")
    add("--batch-size", type=int, default=24, help="images per device and batch")
    add("--accumulation", type=int, default=1, help="batches per optimization step")
    add("--steps", type=int, default=16000, help="optimization steps")
    add("--learning-rate", type=float, default=1e-5, help="peak learning rate")
    add("--schedule", default="linear", help="learning rate schedule by its name in diffusers")
    add("--warmup", type=int, default=4000, help="warmup steps")
    add("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    dropout = "share of images without condition; the authors advise 0.7 or more, as the U-Net must unlearn text"
    add("--conditioning-dropout", type=float, default=0.7, help=dropout)
    add("--learned-unconditional", action="store_true", help="learn the states of no condition, else zeros")
    add("--noise-offset", type=float, default=0.0, help="scale of additional noise per channel")
    add("--snr-gamma", type=float, help="gamma of min-SNR weighting; 5 is usual (default: no weighting)")
    add("--ema", action="store_true", help="keep a moving average of the weights, and validate and save it")
    add("--use-8bit-adam", action="store_true", help="use the AdamW of bitsandbytes, on a GPU")
    add("--gradient-checkpointing", action="store_true", help="save memory in the U-Net, at the cost of time")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="precision of the training steps")
    add("--cache", action="store_true", help="encode all images before training")
    add("--workers", type=int, default=0, help="processes that read images")
    add("--checkpoint-every", type=int, default=500, help="steps between checkpoints, of which two are kept")
    add("--validation-every", type=int, default=0, help="steps between validations; 0 disables them")
    add("--validation-images", type=int, default=4, help="number of images, from the start of the dataset")
    add("--validation-steps", type=int, default=50, help="denoising steps of a validation")
    add("--guidance-scales", type=float, nargs="+", default=[6.0, 7.5, 10.0, 12.5], help="scales of a validation")
    add("--report-to", help="tracker of accelerate, such as tensorboard, wandb or trackio")
    add("--cpu", action="store_true", help="train on the CPU")
    add("--seed", type=int, default=42, help="seed of everything random")
    return parser.parse_args()


def read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def list_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "step.json"}


def is_complete(checkpoint: Path) -> bool:
    """Check that all files have the sizes that `step.json`, which is written last, lists."""
    try:
        return json.loads((checkpoint / "step.json").read_text())["sizes"].items() <= list_sizes(checkpoint).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or broken
        return False


def claim_output(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Exit unless the output folder can be written, and is empty or this run's or to be overwritten."""
    for source in (args.base, args.model):
        if args.output.resolve() in ((find_pipeline(source) or Path(source)).resolve(), Path(source).resolve()):
            raise SystemExit(f"{args.output} holds {source}, from which training starts: choose another --output.")
    file, settings = args.output / "run.json", {}
    for name, value in vars(args).items():
        if name not in FREE_SETTINGS:
            settings[name] = os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        raise SystemExit(f"{args.output} cannot be written: {error}.") from error
    if not args.overwrite and any(path != file for path in args.output.iterdir()):
        ways_out = "choose another --output, or pass --overwrite to start anew in this folder."
        try:
            earlier = json.loads(file.read_text())
            changed = [name for name, value in settings.items() if earlier[name] != value]
        except (OSError, ValueError, KeyError, TypeError):
            raise SystemExit(f"{args.output} is not empty, and not a run of this script: {ways_out}") from None
        if changed:
            raise SystemExit(f"{args.output} holds a run with another {', '.join(changed)}: {ways_out}")
    accelerator.wait_for_everyone()  # until every process has looked
    if accelerator.is_main_process:
        if args.overwrite:
            (args.output / "model_index.json").unlink(missing_ok=True)
            for folder in find_checkpoints(args.output):
                shutil.rmtree(folder)
        file.write_text(json.dumps(settings, indent=2))
    accelerator.wait_for_everyone()


def open_images(path: str, split: str, column: str | None) -> Dataset:
    """Open a dataset and reduce it to one column, `image`, of files that are not decoded yet."""
    if Path(path).is_file():
        dataset = load_dataset("webdataset" if path.endswith(".tar") else "parquet", data_files=path, split=split)
    else:
        dataset = load_dataset(path, split=split)
    image_columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if column is None:  # a webdataset names its columns by the file extensions
        column = image_columns[0] if len(image_columns) == 1 else "image"
    if column not in dataset.column_names:
        raise SystemExit(
            f"{path} has no column {column}: choose one of {', '.join(dataset.column_names)} with --image-column."
        )
    dataset = dataset.select_columns([column]).rename_columns({column: "image"})
    # [`read_image`] decodes them, and names the file that it cannot read.
    return dataset.cast_column("image", Image(decode=False)) if column in image_columns else dataset


def crop_square(image: PIL.Image.Image) -> PIL.Image.Image:
    """Crop the center of an image, which both the VAE and the vision tower see, as in the released code."""
    return fit(image, (min(image.size), min(image.size)))


class Collate:
    """Turns images into inputs of the VAE and of the vision tower."""

    def __init__(self, processor: MetaMorphProcessor, pipe: MetaMorphPipeline, size: int):
        self.processor, self.image_processor, self.size = processor, pipe.image_processor, size

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [read_image(row["image"]) for row in rows]
        batch = {"pixels": self.image_processor.preprocess([fit(image, (self.size, self.size)) for image in images])}
        if "visual_tokens" in rows[0]:
            return {**batch, "visual_tokens": torch.tensor(np.array([row["visual_tokens"] for row in rows]))}
        return {**batch, **self.processor(images=[crop_square(image) for image in images], return_tensors="pt")}


def build_pipelines(args: argparse.Namespace) -> tuple[MetaMorphPipeline, MetaMorphPipeline]:
    """Return a pipeline of the model and the base with the base's or a new projector, and one without the model."""
    index = DiffusionPipeline.load_config(args.base)
    if "unet" not in index:
        raise SystemExit(
            f"--base {args.base} is a {index['_class_name']}, which has no U-Net: take a pipeline such as Stable "
            "Diffusion 1.5 or 2.1, not Stable Diffusion 3 or Flux."
        )
    model_path, processor_path = resolve_model(args.model)
    model = MetaMorphForConditionalGeneration.from_pretrained(model_path, dtype="auto").eval()
    processor = MetaMorphProcessor.from_pretrained(processor_path)
    if "MetaMorphPipeline" in index["_class_name"]:
        base = MetaMorphPipeline.from_pretrained(args.base, model=None, processor=None)
    else:
        base = DiffusionPipeline.from_pretrained(args.base)
    projector = base.components.get("projector")
    if projector is None:
        padding = args.pad_to or None
        projector = VisualTokenProjector(
            visual_token_dim=model.config.visual_token_dim,
            cross_attention_dim=base.unet.config.cross_attention_dim,
            projector_type=args.projector_type,
            num_layers=args.projector_layers,
            hidden_dim=args.projector_width,
            num_image_tokens=model.config.num_image_tokens,
            sequence_length=padding,
            num_queries=None if args.projector_type == "mlp" else padding or model.config.num_image_tokens,
            learned_unconditional=args.learned_unconditional,
        )
    elif args.learned_unconditional and projector.unconditional is None:
        trained = projector.state_dict()
        projector = VisualTokenProjector.from_config(projector.config, learned_unconditional=True)
        projector.load_state_dict({"unconditional": projector.unconditional, **trained})
    options = ("default_guidance_scale", "default_num_inference_steps", "instruction_template")
    config = {name: base.config[name] for name in options if name in base.config}
    if (folder := find_pipeline(args.model)) is not None:  # the model was trained on this template
        config["instruction_template"] = MetaMorphPipeline.load_config(folder)["instruction_template"]
    shared = {"projector": projector, "unet": base.unet, "vae": base.vae, "scheduler": base.scheduler, **config}
    visualizer = MetaMorphPipeline(model=None, processor=None, **shared)
    visualizer.set_progress_bar_config(disable=True)
    return MetaMorphPipeline(model=model, processor=processor, **shared), visualizer


class VisualizerTraining:
    """One run of the script: what is trained, on which data, and how it is checked and saved."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.pipeline, self.visualizer = build_pipelines(args)
        self.model, self.vae, unet = self.pipeline.model, self.pipeline.vae, self.pipeline.unet
        self.model.requires_grad_(False).base_model.vision_tower.to(accelerator.device)  # the rest is only saved
        self.vae.requires_grad_(False).to(accelerator.device)
        unet.requires_grad_(args.unet == "full").to(accelerator.device)
        if args.unet == "lora":
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=targets))
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        module = ConditionedUNet(self.pipeline.projector.to(accelerator.device), unet).train()
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)

        size = args.size or self.pipeline.default_size[0]
        self.collate = Collate(self.pipeline.processor, self.pipeline, size)
        dataset = open_images(args.images, args.split, args.image_column)
        shown = [dataset[index] for index in range(min(args.validation_images, len(dataset)))]
        self.originals = [crop_square(read_image(row["image"])) for row in shown]
        self.original_tokens = self.encode(self.collate(shown)) if shown else None
        if args.cache:
            with accelerator.main_process_first():  # the other processes read its cache
                dataset = self.cache_visual_tokens(dataset)
        self.order = torch.Generator()
        loader = DataLoader(
            dataset,
            batch_size=args.batch_size,
            sampler=RandomSampler(dataset, generator=self.order),
            collate_fn=self.collate,
            num_workers=args.workers,
            drop_last=len(dataset) >= args.batch_size * accelerator.num_processes,
        )
        optimizer_class = torch.optim.AdamW
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        optimizer = optimizer_class(self.trained, lr=args.learning_rate, weight_decay=args.weight_decay)
        schedule = get_scheduler(
            args.schedule,
            optimizer,
            num_warmup_steps=args.warmup * accelerator.num_processes,  # accelerate steps it once per process
            num_training_steps=args.steps * accelerator.num_processes,
        )
        prepared = accelerator.prepare(module, optimizer, loader, schedule)
        self.module, self.optimizer, self.loader, self.schedule = prepared
        self.ema = EMAModel(self.trained) if args.ema else None
        if self.ema is not None:
            self.ema.to(accelerator.device)
            save_ema_with(accelerator, self.ema)

    @torch.no_grad()
    def encode(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the visual tokens (I, N, V) of a batch, in float32."""
        if "visual_tokens" in batch:
            return batch["visual_tokens"].float()
        return self.model.get_visual_tokens(batch["pixel_values"].to(self.accelerator.device)).float()

    def cache_visual_tokens(self, dataset: Dataset) -> Dataset:
        """Add a column with the visual tokens on disk, so that the vision tower need not run during training."""
        shape = (self.model.config.num_image_tokens, self.model.config.visual_token_dim)

        def encode(columns: dict[str, list]) -> dict[str, list]:
            tokens = self.encode(self.collate([{"image": image} for image in columns["image"]]))
            return {"visual_tokens": list(tokens.cpu().numpy())}

        features = Features({**dataset.features, "visual_tokens": Array2D(shape, "float32")})
        tower, image_processor = self.model.base_model.vision_tower, self.collate.processor.image_processor
        parts = (hash_module(tower), self.model.config.to_dict(), image_processor.to_dict())
        options = {"batched": True, "batch_size": 32, "desc": "Visual tokens"}
        return dataset.map(encode, features=features, **options, **cache_options(dataset, "visualizer-tokens", *parts))

    def compute_loss(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        # The noise only depends on the index of the batch, so that resuming does not change it.
        stream = batch_index * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + stream)
        with torch.no_grad():
            clean = self.vae.encode(batch["pixels"].to(self.vae.dtype)).latent_dist.mode()
        clean = clean.float() * self.vae.config.scaling_factor
        kept = torch.rand(len(clean), generator=generator) >= self.args.conditioning_dropout
        predict = partial(self.module, visual_tokens=self.encode(batch), kept=kept.to(clean.device))
        options = (self.args.noise_offset, self.args.snr_gamma)
        return diffusion_loss(predict, self.noise_scheduler, clean, generator, *options)

    def run(self) -> None:
        """Train from the last checkpoint, if there is one, to the last step, and save the pipeline."""
        args, accelerator = self.args, self.accelerator
        step = self.load_checkpoint()
        if step >= args.steps and (args.output / "model_index.json").is_file():
            accelerator.print(f"{args.output} is finished, with nothing left to train: raise --steps to train on.")
            return
        if accelerator.is_main_process:  # this file marks a finished run
            (args.output / "model_index.json").unlink(missing_ok=True)
        batch_index, loss = step * args.accumulation, None
        progress = tqdm(total=args.steps, initial=step, desc="visualizer", disable=not accelerator.is_main_process)
        while step < args.steps:
            epoch, start = divmod(batch_index, len(self.loader))
            self.order.manual_seed(args.seed + epoch)
            for batch in accelerator.skip_first_batches(self.loader, start) if start else self.loader:
                with accelerator.accumulate(self.module):
                    loss = self.compute_loss(batch, batch_index)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.trained, 1.0)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                batch_index += 1
                if batch_index % args.accumulation == 0:
                    step += 1
                    progress.update()
                    self.finish_step(step, loss.detach(), progress)
                if step == args.steps:
                    break
        progress.close()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.save_pipeline()
            print(f"saved {args.output}, " + ("nothing left to train" if loss is None else f"loss {loss.item():.4f}"))
        accelerator.end_training()

    def finish_step(self, step: int, loss: torch.Tensor, progress: tqdm) -> None:
        """Average, log, save and validate when it is time to."""
        args, accelerator = self.args, self.accelerator
        if not loss.isfinite():
            raise SystemExit(f"The loss is {loss.item()} in step {step}: lower the learning rate.")
        if self.ema is not None:
            self.ema.step(self.trained)
        if step % 10 == 0 or step == args.steps:
            mean = accelerator.gather(loss).mean().item()
            progress.set_postfix(loss=f"{mean:.4f}")
            accelerator.log({"loss": mean, "learning_rate": self.schedule.get_last_lr()[0]}, step=step)
        if step % args.checkpoint_every == 0 or step == args.steps:
            self.save_checkpoint(step)
        validates = args.validation_every and step % args.validation_every == 0
        if validates and self.originals and accelerator.is_main_process:
            if self.ema is not None:
                self.ema.store(self.trained)
                self.ema.copy_to(self.trained)
            grid = self.validate()
            if self.ema is not None:
                self.ema.restore(self.trained)
            (args.output / "validation").mkdir(parents=True, exist_ok=True)
            grid.save(args.output / "validation" / f"step-{step:06}.png")
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"validation": [grid]}, step=step)

    def validate(self) -> PIL.Image.Image:
        """Return a grid with one row per image: the original, and its decoding at each guidance scale."""
        columns = []
        for scale in self.args.guidance_scales:
            generators = [torch.Generator().manual_seed(self.args.seed) for _ in self.originals]
            options = {"num_inference_steps": self.args.validation_steps, "generator": generators}
            columns.append(self.visualizer.decode_visual_tokens(self.original_tokens, guidance_scale=scale, **options))
        originals = [image.resize(columns[0][0].size) for image in self.originals]
        cells = [image for row in zip(originals, *columns) for image in row]
        return make_image_grid(cells, rows=len(originals), cols=1 + len(columns))

    def load_checkpoint(self) -> int:
        """Load the newest complete checkpoint, if any, and return its step."""
        for folder in reversed(find_checkpoints(self.args.output)):
            if is_complete(folder):
                self.accelerator.print(f"continuing from {folder}")
                self.accelerator.load_state(str(folder))
                return read_step(folder)
            self.accelerator.print(f"{folder} is incomplete or damaged, and is skipped")
        return 0

    def save_checkpoint(self, step: int) -> None:
        """Save a checkpoint that `step.json` marks as complete, and delete all but the last two."""
        folder = self.args.output / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            (folder / "step.json").unlink(missing_ok=True)  # of a damaged checkpoint that is written anew
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (folder / "step.json").write_text(json.dumps({"step": step, "sizes": list_sizes(folder)}))
            earlier = [path for path in find_checkpoints(self.args.output) if read_step(path) < step]
            for old in earlier[:-1]:
                shutil.rmtree(old)

    def save_pipeline(self) -> None:
        """Save the pipeline with its averaged weights, and a card with sample images and settings."""
        args, unet = self.args, self.pipeline.unet
        if self.ema is not None:
            self.ema.copy_to(self.trained)
        if args.unet == "lora":
            unet.save_lora_adapter(args.output / "unet_lora")
            unet.fuse_lora()
            unet.unload_lora()
        unet.requires_grad_(False)
        self.pipeline.save_pretrained(args.output)
        lines = []
        if self.originals:
            self.validate().save(args.output / "reconstructions.png")
            lines += ["![reconstructions](reconstructions.png)", ""]
            lines += [f"*Original images, and reconstructions at guidance scales {args.guidance_scales}.*", ""]
        settings = ("unet", "steps", "batch_size", "accumulation", "learning_rate", "conditioning_dropout", "seed")
        rows = [f"| {name.replace('_', ' ')} | {getattr(args, name)} |" for name in settings]
        description = "\n".join([*lines, "## Training", "", "| setting | value |", "|---|---|", *rows])
        base = None if Path(args.base).exists() else args.base  # a path of this machine is not published
        self.pipeline.create_model_card(args.output.name, description, base).save(args.output / "README.md")


def train(args: argparse.Namespace) -> None:
    accelerator = Accelerator(
        # A resumed run may begin in the middle of an epoch, so accumulation must not restart at the ends of epochs.
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulation, sync_with_dataloader=False),
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        cpu=args.cpu,
        project_config=ProjectConfiguration(project_dir=str(args.output), logging_dir=str(args.output / "logs")),
    )
    claim_output(args, accelerator)
    set_seed(args.seed)
    training = VisualizerTraining(args, accelerator)
    if args.report_to is not None:
        accelerator.init_trackers("visualizer", {name: str(value) for name, value in vars(args).items()})
    training.run()


def main() -> None:
    args = parse_args()
    with exit_with_sentence():
        train(args)


if __name__ == "__main__":
    main()
