"""What each stage of VPiT trains: frozen modules, the rows of the image tokens, adapters."""

import contextlib
import copy
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_metamorph import MetaMorphForConditionalGeneration


def complete_peft_config(
    peft_config: PeftConfig, model: MetaMorphForConditionalGeneration, train_vision_tower: bool = False
) -> PeftConfig:
    """
    What a [`~peft.LoraConfig`] (LoRA, DoRA, QLoRA) leaves open, filled in for VPiT: adapters on all linear layers of
    the language model, projector and vision head trained whole, and the rows of `<image_start>` and `<image_end>`.

    Args:
        peft_config ([`~peft.PeftConfig`]): Only `target_modules`, `exclude_modules`, `modules_to_save` and
            `trainable_token_indices` that are None are filled in. Another kind than LoRA is returned as it is.
        model ([`MetaMorphForConditionalGeneration`]): Whose modules are looked through; it may be on the meta device.
        train_vision_tower (`bool`, *optional*, defaults to `False`): Train the vision tower whole, too.
    """
    if not isinstance(peft_config, LoraConfig):
        return peft_config
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        language_model = model.model.language_model
        linear = (nn.Linear, Conv1D)
        found = {name.rsplit(".")[-1] for name, module in language_model.named_modules() if isinstance(module, linear)}
        peft_config.target_modules = rf".*\blanguage_model\..*\b({'|'.join(map(re.escape, sorted(found)))})"
    if peft_config.exclude_modules is None:
        # Its layers are named as the language model's, but it gives the visual tokens: trained whole or not at all.
        peft_config.exclude_modules = r"(.*\.)?vision_tower\..*"
    if peft_config.modules_to_save is None:
        peft_config.modules_to_save = ["projector", "vision_head"] + ["vision_tower"] * train_vision_tower
    if peft_config.trainable_token_indices is None:
        rows = [model.config.image_start_token_id, model.config.image_end_token_id]
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        peft_config.trainable_token_indices = {name.rsplit(".")[-1]: rows}
        if not model.config.tie_word_embeddings and "lm_head" not in peft_config.modules_to_save:
            peft_config.trainable_token_indices["lm_head"] = rows
    return peft_config


@contextlib.contextmanager
def only_image_token_embeddings(model: MetaMorphForConditionalGeneration) -> Iterator[None]:
    """
    Lets gradients reach the embeddings of `<image_start>` and `<image_end>` alone. The released stage 1 trains the
    whole matrix, of which these two rows are all that its stage 2 takes over.
    """
    embeddings, lm_head = model.get_input_embeddings(), model.lm_head
    image_ids = torch.tensor([model.config.image_start_token_id, model.config.image_end_token_id])

    def detach_others(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        is_trained = torch.isin(args[0], image_ids.to(args[0].device)).unsqueeze(-1)
        return torch.where(is_trained, output, output.detach())

    handle = embeddings.register_forward_hook(detach_others)
    if lm_head.weight is embeddings.weight:  # tied: as lm_head, too, the other rows must stay
        lm_head.forward = lambda hidden_states: F.linear(hidden_states, lm_head.weight.detach())
    try:
        yield
    finally:
        handle.remove()
        lm_head.__dict__.pop("forward", None)


def module_of(parameter_name: str) -> str:
    modules = ("vision_tower", "projector", "vision_head", "lm_head")
    return next((module for module in modules if module in parameter_name.split(".")), "language_model")


__all__ = ["complete_peft_config"]
