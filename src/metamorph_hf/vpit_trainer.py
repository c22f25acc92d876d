"""Visual-Predictive Instruction Tuning (VPiT, arXiv 2412.14164 section 3) on TRL's `SFTTrainer`."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import load_image
from trl import SFTTrainer

from .configuration_metamorph import MetaMorphConfig
from .processing_metamorph import MetaMorphProcessor
from .vpit_config import VPiTConfig


@dataclass
class DataCollatorForVPiT:
    r"""
    Conversations with images in any turn to a padded batch whose `labels` say everything: assistant turns are targets,
    their images (`image_token_id`) included, all else is -100.

    Each example has `messages` in the standard chat form and, one per image part and in reading order, either `images`
    (anything that `transformers.image_utils.load_image` reads) or `visual_tokens` (tensors of shape (N, V) from
    `model.get_visual_tokens`, so that the tower need not run).

    Args:
        processor (`MetaMorphProcessor`): Its chat template needs `{% generation %}` marks.
        max_length (`int`, *optional*): Longest conversation in tokens.

    Raises:
        ValueError: if images and image parts differ in number, an image cannot be read, a conversation is longer than
            `max_length`, or some examples of a batch bring pixels and others visual tokens. The example is named by
            its `id`, else by its place in the batch.
    """

    processor: MetaMorphProcessor
    max_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        processor, tokenizer = self.processor, self.processor.tokenizer
        image_ids = tokenizer(processor.replace_image_token(), add_special_tokens=False).input_ids
        encoded = tokenizer.apply_chat_template(
            [example["messages"] for example in examples],
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        input_ids, labels, images, visual_tokens = [], [], [], []
        for index, (example, ids, mask) in enumerate(
            zip(examples, encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ):
            name = f"Example {example.get('id', f'{index} of the batch')}"
            expanded_ids, expanded_labels = [], []
            for token, learned in zip(ids, mask, strict=True):
                tokens = image_ids if token == processor.image_token_id else [token]
                expanded_ids += tokens
                expanded_labels += tokens if learned else [-100] * len(tokens)
            placeholders = ids.count(processor.image_token_id)
            given = example.get("visual_tokens", example.get("images")) or []
            if len(given) != placeholders:
                raise ValueError(f"{name} has {placeholders} image parts in its messages, but {len(given)} images.")
            if self.max_length is not None and len(expanded_ids) > self.max_length:
                raise ValueError(
                    f"{name} has {len(expanded_ids)} tokens, more than max_length={self.max_length}. Shorten it, "
                    "leave it out, or raise max_length: cutting it could cut through an image."
                )
            if "visual_tokens" in example:
                visual_tokens += [torch.as_tensor(tokens) for tokens in given]
            else:
                images += [self._read(image, f"{name}, image {number}") for number, image in enumerate(given)]
            input_ids.append(torch.tensor(expanded_ids))
            labels.append(torch.tensor(expanded_labels))
        if images and visual_tokens:
            raise ValueError("Some examples of the batch bring `images`, others `visual_tokens`: use one of the two.")

        lengths = torch.tensor([len(ids) for ids in input_ids])
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        if visual_tokens:
            batch["visual_tokens"] = torch.stack(visual_tokens)
        if images:
            batch["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    @staticmethod
    def _read(image: Any, name: str):
        try:
            return load_image(image).convert("RGB")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{name} cannot be read ({image if isinstance(image, str) else type(image)}): {error}"
            ) from error


class VPiTTrainer(SFTTrainer):
    """
    Trains a [`MetaMorphForConditionalGeneration`] on conversations with images: [`~trl.SFTTrainer`] with both losses.

    Each loss is a mean over its own labels in the whole optimisation step, over all devices and accumulation steps.
    `text_loss` and `visual_loss` are logged apart, as means since the last log.

    Args:
        model ([`MetaMorphForConditionalGeneration`] or `str`): The model, or where to load it from.
        args ([`VPiTConfig`]): `stage` decides what is trained.
        processing_class ([`MetaMorphProcessor`], *optional*): Defaults to the model's.
        data_collator (*optional*): Defaults to [`DataCollatorForVPiT`].
        kwargs: Everything else that [`~trl.SFTTrainer`] takes.
    """

    def __init__(self, model, args: VPiTConfig, processing_class: MetaMorphProcessor, data_collator=None, **kwargs):
        if data_collator is None:
            data_collator = DataCollatorForVPiT(processing_class, max_length=args.max_length)
        super().__init__(model, args, processing_class=processing_class, data_collator=data_collator, **kwargs)
        # compute_loss divides by the counts of the whole step, so Trainer must not divide again.
        self.loss_is_scaled_for_ga = True
        self._loss_sums = defaultdict(lambda: torch.zeros(4, device=self.accelerator.device))
        metamorph = self.accelerator.unwrap_model(self.model)
        self._check_agreement(metamorph.config, processing_class)
        if kwargs.get("peft_config") is None:  # PEFT decides by itself what is trained
            metamorph.requires_grad_(args.stage == "full")
            metamorph.model.projector.requires_grad_(True)
            metamorph.model.vision_tower.requires_grad_(False)

    @staticmethod
    def _check_agreement(config: MetaMorphConfig, processor: MetaMorphProcessor) -> None:
        for name in ("image_token_id", "image_start_token_id", "image_end_token_id", "num_image_tokens"):
            if getattr(config, name) != getattr(processor, name):
                raise ValueError(
                    f"The model's {name} is {getattr(config, name)}, but the processor's is "
                    f"{getattr(processor, name)}: they must come from the same checkpoint."
                )
        if len(processor.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(processor.tokenizer)} tokens, but the model's vocabulary has "
                f"{config.text_config.vocab_size}: call model.resize_token_embeddings(len(processor.tokenizer))."
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Text and visual labels of the whole optimisation step, over all processes. Shape (2,)."""
        if not batch_samples:
            return None
        image_token_id = self.accelerator.unwrap_model(self.model).config.image_token_id
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            labels = batch["labels"][:, 1:]
            num_visual = (labels == image_token_id).sum()
            counts += torch.stack([(labels != -100).sum() - num_visual, num_visual]).to(device)
        return self.accelerator.gather(counts.unsqueeze(0)).sum(0)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        scale = 1
        if num_items_in_batch is not None:
            num_text_items, num_visual_items = num_items_in_batch.clamp(min=1)
            inputs = {**inputs, "num_text_items": num_text_items, "num_visual_items": num_visual_items}
            scale = self.accelerator.num_processes  # data parallelism averages gradients over processes
        outputs = model(**inputs, use_cache=False)
        text_count, visual_count = outputs.num_text_labels, outputs.num_visual_labels
        sums = [
            outputs.text_loss.detach() * (text_count if num_items_in_batch is None else num_text_items),
            text_count,
            outputs.visual_loss.detach() * (visual_count if num_items_in_batch is None else num_visual_items),
            visual_count,
        ]
        self._loss_sums["train" if self.model.training else "eval"] += torch.stack([s.float() for s in sums])
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._loss_sums:
            sums = self.accelerator.gather(self._loss_sums.pop(mode).unsqueeze(0)).sum(0).tolist()
            for name, total, count in (("text_loss", *sums[:2]), ("visual_loss", *sums[2:])):
                if count:
                    self._metrics[mode][name].append(total / count)
        super().log(logs, start_time)


__all__ = ["DataCollatorForVPiT", "VPiTTrainer"]
