"""Train a MetaMorph by Visual-Predictive Instruction Tuning (VPiT): stage 1 or 2, full, LoRA or QLoRA.

    python examples/train_vpit.py --config examples/configs/cpu_smoke.yaml --model_name_or_path my-metamorph

Without data it trains on the emoji in this repository. Every field of VPiTConfig (TRL's SFTConfig) and of TRL's
ModelConfig is a flag and a key of the YAML file; flags win. On several devices:

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/train_vpit.py --config ...

What it leaves in `output_dir`: the model (or its adapter, and the two merged in `merged`), the processor and a card.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

import metamorph_hf
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
from metamorph_hf.vpit.trainer import last_complete_checkpoint


@dataclass
class DataArguments:
    """What to train on, and how to look at it while training."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "LLaVA JSON or JSONL, or Hub dataset of messages and images. Default: the emoji pictures."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset while training."})
    mixture: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Sources and their shares, in a YAML file: see load_mixture and examples/configs/mixture.yaml."
        },
    )
    mixture_size: int | None = field(default=None, metadata={"help": "Samples in a mixture that has weights."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths start from."})
    eval_samples: int = field(default=0, metadata={"help": "Samples to keep back for evaluation."})
    precompute: bool = field(
        default=False, metadata={"help": "Encode all images first, and train without the vision tower."}
    )
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Generate an image of a red apple."],
        metadata={"help": "Answered every sample_steps steps."},
    )
    sample_steps: int = field(default=0, metadata={"help": "How often; 0 for never."})
    visualizer: str | None = field(
        default=None, metadata={"help": "MetaMorphPipeline that paints the answers, e.g. examples/emoji/checkpoint."}
    )


def emoji_conversations(training_args: VPiTConfig, size: int) -> Dataset:
    """`size` conversations about the emoji pictures, made when they are read."""
    from emoji.emoji_images import load_images
    from emoji.emoji_tasks import MIXTURE, UNDERSTANDING, EmojiTasks, training_stream

    rows, pixels = load_images()
    pictures = pixels.permute(0, 2, 3, 1).numpy()
    mixture = UNDERSTANDING if training_args.stage == "projector" else MIXTURE
    group = training_args.per_device_train_batch_size
    return training_stream(
        EmojiTasks(rows), mixture, size, group, "images", lambda view, image, task: Image.fromarray(pictures[image])
    )


def load_data(args: DataArguments, training_args: VPiTConfig) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """What to train on, and what was kept back for evaluation."""
    if args.mixture is not None:
        dataset = load_mixture(args.mixture, training_args.seed, args.mixture_size)
        PartialState().print(mixture_table(dataset))
    elif args.dataset is None:
        per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps
        steps = training_args.max_steps if training_args.max_steps > 0 else 1000
        dataset = emoji_conversations(training_args, per_step * training_args.world_size * steps + args.eval_samples)
        training_args.train_sampling_strategy = "sequential"  # conversations of like length stand together
    else:
        options = {"name": args.dataset_config, "split": args.dataset_split, "streaming": args.streaming}
        task = "llava" if args.dataset.endswith((".json", ".jsonl")) else "chat"
        source = Source(task, args.dataset, **options, options={"image_root": args.image_root})
        dataset = load_mixture([source], training_args.seed)
    if not args.eval_samples:
        return dataset, None
    return dataset.skip(args.eval_samples), dataset.take(args.eval_samples)


def training_facts(trainer: VPiTTrainer, args: DataArguments, base: str) -> dict[str, Any]:
    """What somebody who finds the model wants to know of how it was made."""
    config, state = trainer.args, trainer.state
    last = next((log for log in reversed(state.log_history) if "loss" in log), {})  # none before `logging_steps`
    adapter = trainer.model.peft_config["default"] if isinstance(trainer.model, PeftModel) else None
    return {
        "base model": base,
        "stage": config.stage,
        "data": json.dumps(args.mixture) if args.mixture else args.dataset or "the emoji of metamorph_hf",
        "adapter": "none"
        if adapter is None
        else f"{adapter.peft_type.value}, rank {adapter.r}, alpha {adapter.lora_alpha}",
        "steps": state.global_step,
        "batch (over all devices and accumulation steps)": (
            config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        ),
        "processes": config.world_size,
        "peak learning rate": f"{config.learning_rate * config.learning_rate_scale:.3g}",
        "schedule": f"{config.lr_scheduler_type.value}, warm-up {config.warmup_steps:g}",
        "visual loss weight": trainer.visual_loss_weight,
        "mixed precision": config.mixed_precision,
        **{
            f"last {name}": f"{last[name]:.4f}"
            for name in ("loss", "text_loss", "visual_loss", "visual_cosine")
            if name in last
        },
        "metamorph_hf": metamorph_hf.__version__,
        "torch": torch.__version__,
    }


def write_card(trainer: VPiTTrainer, facts: dict[str, Any]) -> None:
    """TRL's model card, and the training facts as a table."""
    trainer.create_model_card()
    path = Path(trainer.args.output_dir) / "README.md"
    card = ModelCard.load(path)
    card.text += "\n\n## Training facts\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items())
    card.save(path)
    (path.parent / "training_facts.json").write_text(json.dumps(facts, indent=1))


def merge(base: str, folder: Path) -> None:
    """The adapter of `folder` and its base, as a plain checkpoint in `folder`/merged."""
    model = MetaMorphForConditionalGeneration.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    MetaMorphProcessor.from_pretrained(folder).save_pretrained(folder / "merged")
    shutil.copy(folder / "README.md", folder / "merged")


def main() -> None:
    parser = TrlParser((DataArguments, VPiTConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    base = model_args.model_name_or_path
    if base is None:
        parser.error("name a model to start from: --model_name_or_path, e.g. what init_from_pretrained.py made")
    model_dir = processor_dir = base
    if (Path(base) / "model_index.json").is_file():  # a whole pipeline
        model_dir, processor_dir = f"{base}/model", f"{base}/processor"
    processor = MetaMorphProcessor.from_pretrained(processor_dir)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    with PartialState().main_process_first():  # the others then read what it cached
        dataset, eval_dataset = load_data(data_args, training_args)
        if data_args.precompute:
            model = MetaMorphForConditionalGeneration.from_pretrained(model_dir, dtype="auto").to(training_args.device)
            dataset = precompute_visual_tokens(dataset, model, processor)
            eval_dataset = eval_dataset and precompute_visual_tokens(eval_dataset, model, processor)
            del model

    trainer = VPiTTrainer(
        model_dir,
        training_args,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if data_args.sample_steps:
        visualizer = data_args.visualizer and MetaMorphPipeline.from_pretrained(data_args.visualizer, model=None)
        trainer.add_callback(
            LogSamplesCallback(trainer, data_args.sample_prompts, data_args.sample_steps, visualizer or None)
        )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(training_args.output_dir))

    trainer.save_model()
    if trainer.is_world_process_zero():
        write_card(trainer, training_facts(trainer, data_args, base))
        if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
            merge(model_dir, Path(training_args.output_dir))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
