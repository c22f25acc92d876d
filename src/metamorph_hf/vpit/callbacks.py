"""Sample answers of a model while it trains, in a folder and in the trackers."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl.models import unwrap_model_for_generation

from ..pipeline_metamorph import MetaMorphPipeline, check_fit
from .trainer import VPiTTrainer


class LogSamplesCallback(TrainerCallback):
    """
    Answer the same prompts every `every_steps` steps and at the end. Answers and their images are written to `samples`
    in the trainer's `output_dir`, as `step-000100.json` and PNG files, and to those of TensorBoard, Weights & Biases
    and Trackio that the trainer reports to. Training is not affected: the random state is restored.

    Args:
        trainer ([`VPiTTrainer`]): The trainer that the callback is added to by `trainer.add_callback`.
        prompts (`list[str]` or `list[list[dict]]`): User messages, or whole conversations.
        every_steps (`int`): Number of optimization steps between two samples.
        visualizer ([`MetaMorphPipeline`], *optional*):
            Decodes visual tokens into images; its own model is not used. Without it no images are written.
        max_new_tokens (`int`, *optional*, defaults to 256): Maximum length of an answer.
        generation_kwargs (`dict`, *optional*): Further arguments of `model.generate`.
        decode_kwargs (`dict`, *optional*): Further arguments of [`MetaMorphPipeline.decode_visual_tokens`].

    Raises:
        ValueError: if there are no prompts, `every_steps` is below 1, or the visualizer does not fit the model.
    """

    def __init__(
        self,
        trainer: VPiTTrainer,
        prompts: list[str] | list[list[dict[str, Any]]],
        every_steps: int,
        visualizer: MetaMorphPipeline | None = None,
        max_new_tokens: int = 256,
        generation_kwargs: dict[str, Any] | None = None,
        decode_kwargs: dict[str, Any] | None = None,
    ):
        if not prompts or every_steps < 1:
            raise ValueError(
                f"Got {len(prompts)} prompts and every_steps={every_steps}: pass at least one prompt and step."
            )
        if visualizer is not None:
            check_fit(**{**visualizer.components, "model": trainer.metamorph, "processor": trainer.processing_class})
        self.trainer, self.every_steps, self.visualizer = trainer, every_steps, visualizer
        self.conversations = [
            [{"role": "user", "content": [{"type": "text", "text": prompt}]}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        self.output_dir = Path(trainer.args.output_dir) / "samples"
        self.generation_kwargs = {"max_new_tokens": max_new_tokens, "do_sample": False, **(generation_kwargs or {})}
        self.decode_kwargs = decode_kwargs or {}

    def on_step_end(self, args, state, control, **kwargs):
        # The last samples cannot wait for on_train_end, when trackers are closed.
        if state.global_step % self.every_steps == 0 or state.global_step == state.max_steps:
            self.log_samples(state.global_step)

    @torch.no_grad()
    def log_samples(self, step: int) -> None:
        """Answer on every process, as sharded weights require, and write on the main one."""
        trainer, processor = self.trainer, self.trainer.processing_class
        inputs = processor.prepare_prompts(self.conversations).to(trainer.accelerator.device)
        options = {**self.generation_kwargs, "return_dict_in_generate": True}
        options["synced_gpus"] = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        was_training = trainer.model.training
        trainer.model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(trainer.args.seed)
            with (
                unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
                trainer.compute_loss_context_manager(),  # the autocast of training
            ):
                outputs = model.generate(**inputs, **options)
            if trainer.is_world_process_zero():
                answers = processor.decode_generated(outputs.sequences[:, inputs["input_ids"].shape[1] :])
                self._write(step, answers, [self._decode(tokens) for tokens in outputs.visual_tokens])
        if trainer.args.activation_checkpointing:  # TRL enables it again without these options
            options = dict(trainer.args.activation_checkpointing_kwargs or {})
            placed = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **placed)
        trainer.model.train(was_training)
        trainer.accelerator.wait_for_everyone()

    def _decode(self, visual_tokens: torch.Tensor) -> list[Image]:
        if self.visualizer is None or not len(visual_tokens):
            return []
        generator = torch.Generator().manual_seed(self.trainer.args.seed)
        return self.visualizer.decode_visual_tokens(visual_tokens.float(), generator=generator, **self.decode_kwargs)

    def _write(self, step: int, answers: list[str], decoded: list[list[Image]]) -> None:
        """Write records and images to the folder and to the trackers."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        records, logged = [], {}
        for row, (conversation, answer, images) in enumerate(zip(self.conversations, answers, decoded, strict=True)):
            files = [f"step-{step:06}-{row}-{index}.png" for index in range(len(images))]
            for index, (file, image) in enumerate(zip(files, images, strict=True)):
                image.save(self.output_dir / file)
                logged[f"samples/{row}-{index}"] = image
            records.append({"prompt": _format_content(conversation[-1]), "answer": answer, "images": files})
        text = json.dumps(records, indent=1, ensure_ascii=False)
        (self.output_dir / f"step-{step:06}.json").write_text(text, encoding="utf-8")
        for tracker in self.trainer.callback_handler.callbacks:
            if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
                for row, record in enumerate(records):
                    tracker.tb_writer.add_text(f"samples/{row}", f"{record['prompt']}\n\n{record['answer']}", step)
                for name, image in logged.items():
                    tracker.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        for name in {"wandb", "trackio"} & set(self.trainer.args.report_to):  # two packages with the same interface
            tracker = importlib.import_module(name)
            table = tracker.Table(dataframe=pd.DataFrame(records).drop(columns="images"))
            # One entry per image, as trackio ignores lists of images.
            images = {name: tracker.Image(image) for name, image in logged.items()}
            tracker.log({"samples": table, "train/global_step": step, **images})


def _format_content(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "<image>") for part in content)
