"""Train a MetaMorph by Visual-Predictive Instruction Tuning (VPiT): stage 1, or stage 2 whole, with LoRA or QLoRA.

    python examples/train_vpit.py --config examples/configs/cpu_smoke.yaml --model_name_or_path my-metamorph

Without data it trains on the emoji in this repository. Every field of VPiTConfig (TRL's SFTConfig) and of TRL's
ModelConfig is a flag and a key of the YAML file; of several files, later ones take precedence, and flags over all.
`--mixture FILE` reads a file, too, which may be the list of sources alone. On several devices:

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/train_vpit.py --config ...

The model (or its adapter), the processor and a model card are saved in `output_dir`, with `--merge` also the model and
adapter merged in `merged`. A folder that already holds a run is refused: `--resume` continues it, and
`--overwrite_output_dir` starts anew.
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import PartialState
from common import resolve_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from metamorph_hf import (
    LogSamplesCallback,
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
    MetaMorphProcessor,
    VPiTConfig,
    VPiTTrainer,
)
from metamorph_hf.data.mixture import Source, load_mixture, mixture_table
from metamorph_hf.data.precompute import precompute_visual_tokens
from metamorph_hf.vpit.checkpoints import find_checkpoints, last_complete_checkpoint
from metamorph_hf.vpit.stages import load_adapter


# Files that a run writes beside its checkpoints. A later run in the same folder might leave some of them as they are.
PARTS_OF_A_RUN = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PARTS_OF_A_RUN += ("adapter_config.json", "rejected_samples-*.jsonl", "merged")


@dataclass
class ScriptArguments:
    """Arguments of this script: the data, sample answers, and the output folder."""

    dataset: str | None = field(default=None, metadata={"help": "LLaVA JSON(L), or Hub dataset. Default: emoji."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset while training."})
    mixture: list[dict] | None = field(
        default=None, metadata={"help": "YAML file like examples/configs/mixture.yaml."}
    )
    mixture_size: int | None = field(default=None, metadata={"help": "Samples in a mixture with fractions."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    eval_samples: int = field(default=0, metadata={"help": "Samples to hold out for evaluation."})
    precompute: bool = field(default=False, metadata={"help": "Encode all images first, and train without the tower."})
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Generate an image of a red apple."], metadata={"help": "Prompts of sample answers."}
    )
    sample_steps: int = field(default=0, metadata={"help": "Steps between two sample answers; 0 for none."})
    sample_force_image: bool = field(default=False, metadata={"help": "Begin each sample answer with an image."})
    visualizer: str | None = field(default=None, metadata={"help": "MetaMorphPipeline that decodes sample answers."})
    resume: bool = field(default=False, metadata={"help": "Continue from output_dir's last complete checkpoint."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir first."})
    merge: bool = field(default=False, metadata={"help": "Also save model and adapter merged, in output_dir/merged."})


def parse_arguments(flags: list[str] | None = None) -> tuple[ScriptArguments, VPiTConfig, ModelConfig]:
    """Parse flags, and the YAML files that `--config` (each of several) and `--mixture` name."""
    parser = TrlParser((ScriptArguments, VPiTConfig, ModelConfig))
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="extend", nargs="+", default=[])
    files.add_argument("--mixture", action="append", default=[])
    given, flags = files.parse_known_args(flags)
    merged = {}
    for path in [*given.config, *given.mixture]:
        content = yaml.safe_load(Path(path).read_text())
        content = {"mixture": content} if path in given.mixture and isinstance(content, list) else content
        if not isinstance(content, dict):
            parser.error(f"{path} holds {type(content).__name__}, expected a YAML mapping.")
        merged |= content
    os.environ.update({name: str(value) for name, value in merged.pop("env", {}).items()})  # as TrlParser does
    if unknown := parser.set_defaults_with_config(**merged):
        parser.error(f"unknown keys of the files: {' '.join(unknown)}")
    parsed = parser.parse_args_into_dataclasses(flags)
    if parsed[2].model_name_or_path is None:
        parser.error("name a model to start from: --model_name_or_path, e.g. the output of init_from_pretrained.py")
    return parsed


def find_checkpoint(args: ScriptArguments, training_args: VPiTConfig, model: str) -> str | None:
    """
    Return the checkpoint to resume from, or None for a new run from `model`, for which nothing may be lost without a
    flag.
    """
    output_dir = Path(training_args.output_dir)
    if args.resume and args.overwrite_output_dir:
        sys.exit("--resume continues a run and --overwrite_output_dir discards it: pass one of the two.")
    if training_args.resume_from_checkpoint:
        return training_args.resume_from_checkpoint
    has_model = any(output_dir.glob("*.safetensors"))
    if args.resume:
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None and has_model:
            sys.exit(
                f"{output_dir} holds a model, but no complete checkpoint: pass --overwrite_output_dir to start anew."
            )
        return checkpoint
    state, run = PartialState(), find_checkpoints(output_dir)
    for pattern in PARTS_OF_A_RUN:
        run += output_dir.glob(pattern)
    if (run or has_model) and not args.overwrite_output_dir:
        sys.exit(f"{output_dir} already holds a run: pass --resume, --overwrite_output_dir or another --output_dir.")
    source = Path(model).resolve()
    if source == output_dir.resolve() or any(source.is_relative_to(path.resolve()) for path in run):
        sys.exit(f"The model {model} is part of the run that would be discarded: take another --output_dir.")
    state.wait_for_everyone()  # until every process has looked
    if state.is_main_process:
        for path in run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state.wait_for_everyone()
    return None


def load_emoji(training_args: VPiTConfig, size: int) -> Dataset:
    """Return `size` conversations about the emoji, which are made when they are read."""
    from emoji.images import draw_image, load_rows
    from emoji.tasks import MIXTURE, UNDERSTANDING, EmojiTasks, training_stream

    tasks = EmojiTasks(load_rows(), say_first=True)  # as the emoji model answers
    mixture = UNDERSTANDING if training_args.stage == "projector" else MIXTURE
    group = training_args.per_device_train_batch_size
    return training_stream(tasks, mixture, size, group, "images", lambda view, image, task: draw_image(tasks, image))


def load_data(args: ScriptArguments, training_args: VPiTConfig) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Return the data for training, and what is held out for evaluation."""
    names = ("dataset", "dataset_config", "dataset_split", "streaming", "image_root")
    given = [f"--{name}" for name in names if getattr(args, name) != getattr(ScriptArguments, name)]
    if args.mixture is not None and given:
        sys.exit(f"A mixture's sources have these options of their own: leave out {', '.join(given)}, or the mixture.")
    if args.mixture is None and args.mixture_size is not None:
        sys.exit("--mixture_size is set, but there is no mixture.")
    if args.mixture is None and args.dataset is None and given:
        sys.exit(f"{', '.join(given)} need a --dataset: without one, this trains on the emoji.")
    if args.mixture is not None:
        dataset = load_mixture(args.mixture, training_args.seed, args.mixture_size)
        PartialState().print(mixture_table(dataset))
    elif args.dataset is None:
        steps = training_args.max_steps if training_args.max_steps > 0 else 1000
        dataset = load_emoji(training_args, training_args.total_train_batch_size * steps + args.eval_samples)
        training_args.train_sampling_strategy = "sequential"  # keeps conversations of similar length together
    else:
        options = {"name": args.dataset_config, "split": args.dataset_split, "streaming": args.streaming}
        task = "llava" if args.dataset.endswith((".json", ".jsonl")) else "chat"
        source = Source(task, args.dataset, **options, image_root=args.image_root)
        dataset = load_mixture([source], training_args.seed)
    if not args.eval_samples:
        return dataset, None
    if isinstance(dataset, IterableDataset):
        if any("num_samples" in source for source in args.mixture or []):
            sys.exit("A stream with num_samples may repeat rows that --eval_samples holds out: leave out one of them.")
        if 1 < (count := PartialState().num_processes) <= dataset.num_shards:
            sys.exit(
                f"--eval_samples holds out the first rows of a stream. {count} processes, which read shards of their "
                "own, would train on some of them: leave it out, train in one process, or do without streaming."
            )
    elif args.eval_samples >= len(dataset):
        sys.exit(f"--eval_samples holds out {args.eval_samples} samples, but there are only {len(dataset)} in all.")
    held_out = dataset.take(args.eval_samples)
    if isinstance(dataset, IterableDataset) or (args.mixture is None and args.dataset is None):
        return dataset.skip(args.eval_samples), held_out
    # A mixture repeats rows of small sources: the held-out ones must not be trained on.
    pairs = [*zip(*dataset.with_format(None)[:].values())]
    held = set(pairs[: args.eval_samples])
    return dataset.select([index for index, pair in enumerate(pairs) if pair not in held]), held_out


def merge_adapter(folder: Path) -> None:
    """Save the base model with the adapter in `folder` merged as a plain checkpoint in `folder`/merged."""
    model = load_adapter(folder, dtype="auto", device_map=None)
    model.merge_and_unload().save_pretrained(folder / "merged")
    MetaMorphProcessor.from_pretrained(folder).save_pretrained(folder / "merged")
    shutil.copy(folder / "README.md", folder / "merged")


def main() -> None:
    args, training_args, model_args = parse_arguments()
    (base, processor_dir), revision = resolve_model(model_args.model_name_or_path), model_args.model_revision
    checkpoint = find_checkpoint(args, training_args, base)
    processor = MetaMorphProcessor.from_pretrained(processor_dir, revision=revision)
    training_args.model_init_kwargs = {
        "revision": revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    with PartialState().main_process_first():  # The other processes then read its cache.
        dataset, eval_dataset = load_data(args, training_args)
        if args.precompute:
            model = MetaMorphForConditionalGeneration.from_pretrained(base, revision=revision, dtype="auto")
            model.to(training_args.device)
            dataset = precompute_visual_tokens(dataset, model, processor)
            eval_dataset = eval_dataset and precompute_visual_tokens(eval_dataset, model, processor)
            del model

    trainer = VPiTTrainer(
        base,
        training_args,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if args.sample_steps:
        visualizer = MetaMorphPipeline.from_pretrained(args.visualizer, model=None) if args.visualizer else None
        options = {"generation_kwargs": {"force_image": True}} if args.sample_force_image else {}
        trainer.add_callback(
            LogSamplesCallback(trainer, args.sample_prompts, args.sample_steps, visualizer, **options)
        )
    trainer.train(resume_from_checkpoint=checkpoint)

    data = str(args.mixture or args.dataset or "the emoji of metamorph_hf")
    trainer.save_model()
    trainer.create_model_card(dataset_name=data)
    if args.merge and isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        merge_adapter(Path(training_args.output_dir))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data)
    trainer.end()


if __name__ == "__main__":
    main()
