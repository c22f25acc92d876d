"""What each stage of VPiT trains: whole modules, the embeddings of the image tokens, adapters."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count

from ..modeling_metamorph import MetaMorphForConditionalGeneration
from .config import VPiTConfig


def set_trainable(model: MetaMorphForConditionalGeneration | PeftModel, args: VPiTConfig) -> None:
    """Freeze what `args.stage` does not train. See [`only_image_token_embeddings`] for the rest of stage 1."""
    if isinstance(model, PeftModel):
        for parameter in model.parameters():
            if parameter.requires_grad:  # In bfloat16, weights would lose updates of 1e-4.
                parameter.data = parameter.data.float()
        return
    model.requires_grad_(args.stage == "full")
    model.model.vision_tower.requires_grad_(args.vision_tower_learning_rate is not None)
    model.model.projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)


@contextlib.contextmanager
def only_image_token_embeddings(model: MetaMorphForConditionalGeneration) -> Iterator[None]:
    """
    Restrict gradients of the embedding matrix to the rows of `<image_start>` and `<image_end>`. The released stage 1
    trains the whole matrix, but its stage 2 takes over these two rows only.
    """
    embeddings, lm_head = model.get_input_embeddings(), model.lm_head
    image_ids = torch.tensor([model.config.image_start_token_id, model.config.image_end_token_id])

    def detach_others(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        is_trained = torch.isin(args[0], image_ids.to(args[0].device)).unsqueeze(-1)
        return torch.where(is_trained, output, output.detach())

    handle = embeddings.register_forward_hook(detach_others)
    if lm_head.weight is embeddings.weight:  # Without this, a tied lm_head would pass gradients to all rows.
        lm_head.forward = lambda hidden_states: F.linear(hidden_states, lm_head.weight.detach())
    try:
        yield
    finally:
        handle.remove()
        lm_head.__dict__.pop("forward", None)


def complete_peft_config(
    peft_config: PeftConfig, model: MetaMorphForConditionalGeneration, train_vision_tower: bool = False
) -> PeftConfig:
    """
    Return a copy of a [`~peft.LoraConfig`] (LoRA, DoRA, QLoRA) with the settings that it leaves open: adapters on all
    linear layers of the language model, whole projector, vision head and visual queries (of models that decode images
    in parallel), and the rows of `<image_start>` and `<image_end>`.

    Args:
        peft_config ([`~peft.PeftConfig`]): Configurations other than LoRA's are returned as they are.
        model ([`MetaMorphForConditionalGeneration`]): Model to adapt; it may be on the meta device.
        train_vision_tower (`bool`, *optional*, defaults to `False`): Train the vision tower whole, too.
    """
    if not isinstance(peft_config, LoraConfig):
        return peft_config
    peft_config, modules = copy.deepcopy(peft_config), dict(model.named_modules())
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"  # PEFT leaves out lm_head and what is excluded below.
    if peft_config.exclude_modules is None:
        peft_config.exclude_modules = r"(model\.)?(vision_tower|projector|vision_head)\..*"
    if peft_config.modules_to_save is None:
        whole = ["model.projector", "vision_head", "model.visual_queries"] + [
            "model.vision_tower"
        ] * train_vision_tower
        peft_config.modules_to_save = [name.removeprefix("model.") for name in whole if name in modules]
    if peft_config.trainable_token_indices is None:
        rows = [model.config.image_start_token_id, model.config.image_end_token_id]
        name = next(name for name, module in modules.items() if module is model.get_input_embeddings())
        peft_config.trainable_token_indices = {name.rsplit(".")[-1]: rows}
        if not model.config.tie_word_embeddings and "lm_head" not in peft_config.modules_to_save:
            peft_config.trainable_token_indices["lm_head"] = rows
    return peft_config


def group_parameters(model: MetaMorphForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each module, adapters included. Tied weights belong to the embeddings."""
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    frozen_copies = {parameter for wrapper in wrappers for parameter in wrapper.original_module.parameters()}
    embeddings, groups = set(model.get_input_embeddings().parameters()), defaultdict(list)
    for name, parameter in model.named_parameters():
        module = "embeddings" if parameter in embeddings else name.removeprefix("model.").split(".")[0]
        if parameter not in frozen_copies:
            groups[module].append(parameter)
    return groups


def get_learning_rate(module: str, args: VPiTConfig) -> float:
    """Return the peak learning rate of a module named as in [`group_parameters`]."""
    own = vars(args).get(f"{module}_learning_rate")
    return args.learning_rate if own is None else own


def format_trainable_table(model: MetaMorphForConditionalGeneration, args: VPiTConfig) -> str:
    """Return a table of the modules with their parameters, trainable parameters and peak learning rates."""
    lines = [f"{'module':<16}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    for module, parameters in group_parameters(model).items():
        counted = nn.ParameterList(parameters)
        total, trainable = get_model_param_count(counted), get_model_param_count(counted, trainable_only=True)
        if trainable and module == "embeddings" and args.stage == "projector":
            trainable = 2 * model.get_input_embeddings().embedding_dim
        rate = f"{get_learning_rate(module, args):.3g}" if trainable else "frozen"
        lines.append(f"{module:<16}{total:>16,}{trainable:>16,}{rate:>16}")
    return "\n".join(lines)


__all__ = ["complete_peft_config"]
