"""What each stage of VPiT trains: whole modules, the embeddings of the image tokens, adapters."""

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count
from trl.trainer.utils import create_model_from_path

from ..modeling_metamorph import MetaMorphForConditionalGeneration
from .config import VPiTConfig


logger = logging.getLogger(__name__)


def set_trainable(model: MetaMorphForConditionalGeneration | PeftModel, args: VPiTConfig) -> None:
    """
    Freeze what `args.stage` does not train, and keep float32 weights of the rest: in bfloat16 they would lose most
    updates of 1e-4. See [`only_image_token_embeddings`] for the rest of stage 1.
    """
    is_whole = not isinstance(model, PeftModel)
    if is_whole:
        model.requires_grad_(args.stage == "full")
        model.model.vision_tower.requires_grad_(args.vision_tower_learning_rate is not None)
        model.model.projector.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            if is_whole and not (args.bf16 or args.fp16):
                raise ValueError(
                    f"The model is in {parameter.dtype}, which would lose most updates: set bf16=True, which keeps "
                    "float32 weights of all that is trained, or load the model with dtype='float32'."
                )
            parameter.data = parameter.data.float()


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
    Return a copy of a [`~peft.LoraConfig`] (LoRA, DoRA, QLoRA) with what it leaves open: adapters on all linear layers
    of the language model and on its experts (PEFT's `target_parameters`), and the rows of `<image_start>` and
    `<image_end>` of embeddings and `lm_head`, where it does not train these itself. To its `modules_to_save`, add
    projector, vision head and visual queries (of models that decode images in parallel).

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
        experts = {  # matrices of all experts, which are one parameter
            f"{name.split('.')[-1]}.{parameter}"
            for name, module in model.model.language_model.named_modules()
            for parameter, weight in module.named_parameters(recurse=False)
            if weight.ndim == 3 and not isinstance(module, nn.Conv1d)
        }
        if experts and (peft_config.lora_dropout or peft_config.use_dora or peft_config.lora_bias):
            logger.warning(
                "The experts are left out: PEFT cannot adapt them with lora_dropout, use_dora or lora_bias. Set "
                "target_modules to say which layers to adapt, or leave out these options."
            )
        elif experts and peft_config.target_parameters is None:
            peft_config.target_parameters = sorted(experts)
    if peft_config.exclude_modules is None:
        peft_config.exclude_modules = r"(model\.)?(vision_tower|projector|vision_head)\..*"
    whole = ["model.projector", "vision_head", "model.visual_queries"] + ["model.vision_tower"] * train_vision_tower
    defaults = [name.removeprefix("model.") for name in whole if name in modules]
    peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), *defaults]))
    embeddings = next(name for name, module in modules.items() if module is model.get_input_embeddings())
    adapted = [
        name
        for name in (embeddings, "lm_head")
        if name.split(".")[-1] in peft_config.modules_to_save or check_target_module_exists(peft_config, name)
    ]
    if adapted and model.config.tie_word_embeddings:
        if check_target_module_exists(peft_config, embeddings):
            raise ValueError(
                f"{embeddings} is in target_modules, but lm_head, which shares its weights, cannot be adapted: name "
                "it in modules_to_save, or its tokens in trainable_token_indices."
            )
        adapted, peft_config.ensure_weight_tying = [embeddings, "lm_head"], True
    if peft_config.trainable_token_indices is None:
        rows = [model.config.image_start_token_id, model.config.image_end_token_id]
        names = [embeddings] if model.config.tie_word_embeddings else [embeddings, "lm_head"]
        rest = [name for name in names if name not in adapted]
        peft_config.trainable_token_indices = {name.split(".")[-1]: rows for name in rest} or None
    return peft_config


def load_adapter(path: str, revision: str | None = None, **kwargs) -> PeftModel:
    """Load an adapter to train it further, on the base model that it names, which is loaded with `kwargs`."""
    config = PeftConfig.from_pretrained(path, revision=revision)
    if PartialState().distributed_type in ("MULTI_GPU", "DEEPSPEED"):  # as SFTTrainer: "auto" would split the model
        kwargs["device_map"] = None
    options = {"architecture": MetaMorphForConditionalGeneration, "revision": config.revision, **kwargs}
    base = create_model_from_path(config.base_model_name_or_path, **options)
    return PeftModel.from_pretrained(base, path, is_trainable=True, revision=revision)


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
