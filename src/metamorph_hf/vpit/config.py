"""Configuration of Visual-Predictive Instruction Tuning (VPiT)."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from trl import SFTConfig


# Stage 2 of the released implementation. Its stage 1 follows from it by the square-root rule.
PAPER_LEARNING_RATE, PAPER_BATCH_SIZE = 6.93e-5, 1536
MODULE_LEARNING_RATES = ("projector_learning_rate", "vision_head_learning_rate", "vision_tower_learning_rate")

# Options of TRL that have no effect on VPiT: the values that say what VPiT does, and the reason to refuse others.
UNSUPPORTED_OPTIONS = {
    "packing_strategy": (["bfd", "wrapped"], "it would cut conversations, and images in them: use 'bfd' or 'wrapped'"),
    "eval_packing": ([None, False], "evaluation is not packed"),
    "pad_to_multiple_of": (["auto", None], "batches are padded to their longest conversation"),
    "label_smoothing_factor": ([0], "it would also smooth the labels of visual tokens"),
    "loss_type": (["nll"], "the text loss is the paper's cross-entropy"),
    "average_tokens_across_devices": ([True], "each loss is a mean over the labels of all devices"),
    "completion_only_loss": ([None], "the answers of a conversation are learned, and nothing else"),
    "assistant_only_loss": ([False], "the answers of a conversation are always learned, and nothing else"),
    "chat_template_path": ([None], "set the processor's chat_template before the trainer is made"),
    "eos_token": ([None], "set the eos_token of the processor's tokenizer before the trainer is made"),
    "pad_token": ([None], "set the pad_token of the processor's tokenizer before the trainer is made"),
    "remove_unused_columns": ([False], "the collator needs all columns"),
    "dataset_text_field": (["text"], "conversations are in the column `messages`"),
    "dataset_kwargs": ([None, {"skip_prepare_dataset": True}], "TRL would tokenize the text without its images"),
    "dataset_num_proc": ([None], "conversations are tokenized in the data loader: set dataloader_num_workers"),
    "shuffle_dataset": ([False], "set train_sampling_strategy, or shuffle the dataset itself"),
    "truncation_mode": (["keep_start"], "cutting a conversation could cut through an image: set on_too_long"),
    "use_liger_kernel": ([False], "Liger has no kernels for this model"),
}


@dataclass
class VPiTConfig(SFTConfig):
    r"""
    Configuration of [`VPiTTrainer`]: [`~trl.SFTConfig`] with the paper's defaults (section 3 and appendix A).

    After initialization, all learning rates are those that are used and logged. A copy, for example by
    `dataclasses.replace`, does not scale them again unless the batch size or `base_batch_size` changes.

    Args:
        stage (`str`, *optional*, defaults to `"full"`):
            `"projector"` for stage 1 (paper, section 3.3), which trains the projector and the embeddings of
            `<image_start>` and `<image_end>`; `"full"` for stage 2, which trains all but the vision tower.
        learning_rate (`float`, *optional*):
            Learning rate of modules without one of their own. Defaults to 6.93e-5 at a `base_batch_size` of 1,536.
        base_batch_size (`int`, *optional*):
            Batch size that the given learning rates are meant for. They are multiplied by `sqrt(batch size /
            base_batch_size)`, where the batch size counts all devices and accumulation steps.
        learning_rate_scale (`float`, *optional*): Factor that the learning rates contain. Set by this class.
        projector_learning_rate, vision_head_learning_rate (`float`, *optional*): Default to `learning_rate`.
        vision_tower_learning_rate (`float`, *optional*): Defaults to None, which freezes the vision tower.
        visual_loss_weight (`float`, *optional*):
            Defaults to 0 in stage `"projector"`, and to the model configuration's `visual_loss_weight` in `"full"`.
        on_nonfinite_loss (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at a NaN or infinite loss or gradient, `"skip"` makes no update, or leaves out the batch in
            evaluation. With DeepSpeed gradients are not checked, and with float16 its scaler skips such steps.
        max_length (`int`, *optional*, defaults to 4096):
            Maximum length of a conversation, visual tokens included; never more than the language model's context.
        on_too_long (`str`, *optional*, defaults to `"refuse"`):
            `"refuse"` treats a longer conversation as a bad sample, `"drop_turns"` drops whole turns from its end.
        packing (`bool`, *optional*, defaults to `False`):
            Put several whole conversations in each row of at most `max_length` tokens; batch sizes then count rows.
        packing_strategy (`str`, *optional*, defaults to `"bfd"`): See [`~metamorph_hf.vpit.packing.pack_lengths`].
        padding_free (`bool`, *optional*, defaults to `False`):
            Join the rows of a batch in one, which flash attention needs (packing then does it by itself).
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at a sample that cannot be used, `"skip"` lists it in `rejected_samples-<process>.jsonl`.
        max_bad_share (`float`, *optional*, defaults to 0.01):
            Stop when a larger share of an epoch's samples (of a stream: of those so far, or of 1,000) was skipped.

    Raises:
        ValueError: if a choice is unknown, or an option is set that VPiT or the stage does not support.
    """

    stage: Literal["projector", "full"] = field(default="full", metadata={"help": "Stage 1 or stage 2 of the paper."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: the paper's, for the batch size."})
    base_batch_size: int | None = field(default=None, metadata={"help": "Batch size that learning rates are for."})
    learning_rate_scale: float | None = field(default=None, metadata={"help": "Set automatically; do not pass it."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    vision_head_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "Default: the tower is frozen."})
    visual_loss_weight: float | None = field(default=None, metadata={"help": "Default: the model's; 0 in stage 1."})
    on_nonfinite_loss: Literal["raise", "skip"] = field(default="raise", metadata={"help": "Stop, or skip the step."})
    max_length: int | None = field(default=4096, metadata={"help": "Maximum tokens of a conversation and its images."})
    on_too_long: Literal["refuse", "drop_turns"] = field(default="refuse", metadata={"help": "Or drop last turns."})
    on_bad_sample: Literal["raise", "skip"] = field(default="raise", metadata={"help": "Stop, or skip and count it."})
    max_bad_share: float = field(default=0.01, metadata={"help": "Stop when a larger share of samples was skipped."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rates."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1, their share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses in logs."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator needs all columns."})

    def __post_init__(self):
        for name in ("stage", "on_nonfinite_loss", "on_too_long", "on_bad_sample"):
            choices = get_args(VPiTConfig.__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, choices))}.")
        for name in MODULE_LEARNING_RATES[1:]:
            if self.stage == "projector" and getattr(self, name) is not None:
                raise ValueError(f"{name} is set, but stage 'projector' freezes that module: use stage 'full'.")
        for name in ("eos_token", "pad_token"):
            if getattr(self, name) == f"<{name.upper()}>":  # which to_dict writes in place of secrets
                setattr(self, name, None)
        for name, (supported, reason) in UNSUPPORTED_OPTIONS.items():
            if getattr(self, name) not in supported:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by VPiT: {reason}.")
        sampling = self.train_sampling_strategy
        if self.packing and sampling not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={sampling!r} needs lengths that differ, which packed rows do not have: use "
                "'random' or 'sequential'."
            )
        if self.learning_rate is None:
            self.learning_rate = PAPER_LEARNING_RATE * (self.learning_rate_scale or 1)
            self.base_batch_size = self.base_batch_size or PAPER_BATCH_SIZE
        if self.activation_checkpointing is None:  # TRL's default has the old name, of which transformers warns
            self.activation_checkpointing = self.gradient_checkpointing
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # By default accelerate concatenates a stream's batches of all processes, which fails for sample names.
            self.accelerator_config.dispatch_batches = False
        scale = math.sqrt(self.total_train_batch_size / self.base_batch_size) if self.base_batch_size else 1.0
        for name in ("learning_rate", *MODULE_LEARNING_RATES):
            if (rate := getattr(self, name)) is not None:
                setattr(self, name, rate * (scale / (self.learning_rate_scale or 1)))
        self.learning_rate_scale = scale

    @property
    def total_train_batch_size(self) -> int:
        """Conversations per optimization step, over all devices and accumulation steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size
