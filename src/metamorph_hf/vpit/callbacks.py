"""Looking at a model while it trains: its answers to fixed prompts, painted, in a folder and in the trackers."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl.models import unwrap_model_for_generation


if TYPE_CHECKING:
    from ..pipeline_metamorph import MetaMorphPipeline
    from .trainer import VPiTTrainer


class LogSamplesCallback(TrainerCallback):
    """
    Answers the same prompts every `every_steps` steps and at the end. Texts go to `step-000100.json` in a folder,
    pictures beside it, and both to those of TensorBoard, Weights & Biases and Trackio that the trainer reports to.

    Training goes on as if nothing had happened: the random state is put back.

    Args:
        trainer ([`VPiTTrainer`]): Add the callback to it with `trainer.add_callback`.
        prompts (`list[str]` or `list[list[dict]]`): What a user asks, or whole conversations.
        every_steps (`int`): How often, in optimisation steps.
        visualizer ([`MetaMorphPipeline`], *optional*):
            Paints the visual tokens; its own model is not used. Without it pictures are counted only.
        output_dir (`str` or `Path`, *optional*): Defaults to `samples` in the trainer's `output_dir`.
        max_new_tokens (`int`, *optional*, defaults to 256): Length of an answer.
        generation_kwargs, paint_kwargs (`dict`, *optional*):
            More for `model.generate` and for [`MetaMorphPipeline.decode_visual_tokens`].

    Raises:
        ValueError: if there are no prompts or `every_steps` is below 1.
    """

    def __init__(
        self,
        trainer: "VPiTTrainer",
        prompts: list[str] | list[list[dict[str, Any]]],
        every_steps: int,
        visualizer: "MetaMorphPipeline | None" = None,
        output_dir: str | Path | None = None,
        max_new_tokens: int = 256,
        generation_kwargs: dict[str, Any] | None = None,
        paint_kwargs: dict[str, Any] | None = None,
    ):
        if not prompts or every_steps < 1:
            raise ValueError(
                f"Got {len(prompts)} prompts and every_steps={every_steps}: pass at least one prompt, and how many "
                "steps (1 or more) lie between two looks at its answer."
            )
        self.trainer, self.every_steps, self.visualizer = trainer, every_steps, visualizer
        self.conversations = [
            [{"role": "user", "content": [{"type": "text", "text": prompt}]}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        self.output_dir = Path(output_dir or Path(trainer.args.output_dir) / "samples")
        self.generation_kwargs = {"max_new_tokens": max_new_tokens, "do_sample": False, **(generation_kwargs or {})}
        self.paint_kwargs = paint_kwargs or {}

    def on_step_end(self, args, state, control, **kwargs):
        # Not on_train_end: trackers are closed by then.
        if state.global_step % self.every_steps == 0 or state.global_step == state.max_steps:
            self.log_samples(state.global_step)

    def log_samples(self, step: int) -> None:
        """Every process answers (sharded weights need them all); the main one paints and writes."""
        with torch.random.fork_rng():
            torch.manual_seed(self.trainer.args.seed)
            answers, visual_tokens = self._answer()
            if self.trainer.is_world_process_zero():
                self._write(step, answers, [self._paint(tokens) for tokens in visual_tokens])
        self.trainer.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _answer(self) -> tuple[list[str], list[torch.Tensor]]:
        trainer, processor = self.trainer, self.trainer.processing_class
        inputs = processor.apply_chat_template(
            self.conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(trainer.accelerator.device)
        was_training = trainer.model.training
        trainer.model.eval()
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            with trainer.compute_loss_context_manager():  # the autocast of training
                outputs = model.generate(
                    **inputs,
                    **self.generation_kwargs,
                    return_dict_in_generate=True,
                    synced_gpus=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
                )
        trainer.model.train(was_training)
        return processor.decode_generated(outputs.sequences[:, inputs["input_ids"].shape[1] :]), outputs.visual_tokens

    def _paint(self, visual_tokens: torch.Tensor) -> list:
        if self.visualizer is None or not len(visual_tokens):
            return []
        generator = torch.Generator().manual_seed(self.trainer.args.seed)
        return self.visualizer.decode_visual_tokens(visual_tokens.float(), generator=generator, **self.paint_kwargs)

    def _write(self, step: int, answers: list[str], pictures: list[list]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        prompts = [self._text_of(conversation) for conversation in self.conversations]
        records = []
        for place, (prompt, answer, images) in enumerate(zip(prompts, answers, pictures, strict=True)):
            names = [f"step-{step:06}-{place}-{number}.png" for number in range(len(images))]
            for name, image in zip(names, images, strict=True):
                image.save(self.output_dir / name)
            records.append({"prompt": prompt, "answer": answer, "images": names})
        (self.output_dir / f"step-{step:06}.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))

        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for place, (record, images) in enumerate(zip(records, pictures, strict=True)):
                    text = f"{record['prompt']}\n\n{record['answer']}"
                    callback.tb_writer.add_text(f"samples/{place}", text, step)
                    for number, image in enumerate(images):
                        name = f"samples/{place}-{number}"
                        callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        for name in ("wandb", "trackio"):  # one interface, two packages
            if name in self.trainer.args.report_to:
                tracker = importlib.import_module(name)
                table = pd.DataFrame(records).drop(columns="images")
                logged = {"samples": tracker.Table(dataframe=table), "train/global_step": step}
                for place, images in enumerate(pictures):  # each by itself, since trackio drops lists of pictures
                    logged |= {f"samples/{place}-{n}": tracker.Image(image) for n, image in enumerate(images)}
                tracker.log(logged)

    @staticmethod
    def _text_of(conversation: list[dict[str, Any]]) -> str:
        content = conversation[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] if part["type"] == "text" else "<image>" for part in content)


__all__ = ["LogSamplesCallback"]
