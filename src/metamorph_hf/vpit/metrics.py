"""Measures that [`VPiTTrainer`] logs: computed for each batch, and summed between two logs."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..configuration_metamorph import MetaMorphConfig
from ..modeling_metamorph import MetaMorphCausalLMOutputWithPast


# Means are divided by the count that they name.
MEANS = dict.fromkeys(("text_loss", "mean_token_accuracy", "entropy"), "num_text_labels")
MEANS |= dict.fromkeys(("visual_loss", "visual_cosine"), "num_visual_labels") | {"aux_loss": "batches"}
COUNTS = ("num_text_labels", "num_visual_labels", "num_images")
RUN_COUNTS = ("num_tokens", "samples", "skipped_samples", "shortened_samples")


def measure_batch(
    inputs: dict[str, Any],
    outputs: MetaMorphCausalLMOutputWithPast,
    num_items_in_batch: torch.Tensor | None,
    num_samples: int,
    config: MetaMorphConfig,
) -> dict[str, torch.Tensor]:
    """
    Return sums over the labels of a batch, and counts. `num_items_in_batch` are the text and visual labels that the
    losses were divided by; None means those of the batch.
    """
    num_text, num_visual = outputs.num_text_labels, outputs.num_visual_labels
    text_items, visual_items = (num_text, num_visual) if num_items_in_batch is None else num_items_in_batch
    if "attention_mask" in inputs:
        num_tokens = inputs["attention_mask"].sum()
    else:  # packed: each conversation has one position 0, and so has each position of the padding
        num_tokens = (inputs["position_ids"] > 0).sum() + num_samples
    return {
        "text_loss": outputs.text_loss.detach() * text_items,
        "mean_token_accuracy": outputs.text_accuracy * num_text,
        "entropy": outputs.text_entropy * num_text,
        "visual_loss": outputs.visual_loss.detach() * visual_items,
        "visual_cosine": outputs.visual_cosine * num_visual,
        "num_text_labels": num_text,
        "num_visual_labels": num_visual,
        "num_images": (inputs["input_ids"] == config.image_token_id).sum() / config.num_image_tokens,
        "num_tokens": num_tokens,
    }


def sum_by_sample(
    inputs: dict[str, Any], outputs: MetaMorphCausalLMOutputWithPast, num_samples: int, image_token_id: int
) -> torch.Tensor:
    """Return text losses, text labels, visual losses and visual labels (4, samples), without waiting for them."""
    labels, device = inputs["labels"], inputs["labels"].device
    if "position_ids" in inputs:  # packed; each position of the padding is 0
        samples = F.pad(inputs["position_ids"][:, 1:] == 1, (0, 1)).flatten().cumsum(0).view_as(labels) - 1
    else:
        samples = torch.arange(num_samples, device=device)[:, None].expand_as(labels)
    is_visual, values = labels[:, 1:] == image_token_id, []
    for mask, losses in (
        ((labels[:, 1:] != -100) & ~is_visual, outputs.text_losses),
        (is_visual, outputs.visual_losses),
    ):
        values += [torch.zeros(mask.shape, device=device).masked_scatter(mask, losses.float()), mask.float()]
    sums = torch.zeros(4, num_samples, device=device)
    return sums.index_add(1, samples[:, 1:].flatten(), torch.stack(values).flatten(1))


def average_by_task(sums_of_processes: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return both losses of each task, given its sums as in [`sum_by_sample`]; none if there is only one task."""
    totals, losses = defaultdict(int), {}
    for sums in sums_of_processes:
        for task, values in sums.items():
            totals[task] = totals[task] + values
    for task, (text_loss, num_text, visual_loss, num_visual) in sorted(totals.items()) if len(totals) > 1 else []:
        means = ("text_loss", text_loss, num_text), ("visual_loss", visual_loss, num_visual)
        losses |= {f"{name}/{task}": float(total / count) for name, total, count in means if count}
    return losses
