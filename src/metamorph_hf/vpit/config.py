"""Configuration of Visual-Predictive Instruction Tuning (VPiT)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from trl import SFTConfig


# The released implementation's stage 2: 6.93e-5 for a batch of 1536. Its stage 1 obeys the same square-root rule.
PAPER_LEARNING_RATE, PAPER_BATCH_SIZE = 6.93e-5, 1536


@dataclass
class VPiTConfig(SFTConfig):
    r"""
    Configuration of [`VPiTTrainer`]. Parameters that [`~trl.SFTConfig`] has keep their meaning; defaults that differ
    are the paper's (section 3 and appendix A) for both stages.

    Args:
        stage (`str`, *optional*, defaults to `"full"`):
            What is trained (paper, section 3.3): `"projector"` for stage 1, the projector and the embeddings of
            `<image_start>` and `<image_end>`, or `"full"` for stage 2, everything but the vision tower.
        learning_rate (`float`, *optional*):
            Of the language model and of what has none of its own. Defaults to the paper's, 6.93e-5 for a batch of
            1,536 conversations, scaled to the batch at hand (see `base_batch_size`).
        base_batch_size (`int`, *optional*):
            Batch size that the learning rates are meant for: they are multiplied by the square root of the batch
            (over all devices and accumulation steps) divided by this. Without it they are used as given, unless
            `learning_rate` is left to its default.
        projector_learning_rate, vision_head_learning_rate (`float`, *optional*): Default to `learning_rate`.
        vision_tower_learning_rate (`float`, *optional*): Without it the vision tower stays frozen, as in the paper.
        visual_loss_weight (`float`, *optional*):
            Weight of the visual loss beside the text loss. Defaults to 0 in stage `"projector"`, whose vision head is
            not trained yet (the released stage 1 has the text loss alone), else to the model configuration's.
        on_nonfinite_loss (`str`, *optional*, defaults to `"raise"`):
            What to do when a loss is NaN or infinite: `"raise"` stops and names step, batch and samples; `"skip"`
            names them in a warning, makes no update from the whole optimisation step, and counts it. Evaluation
            leaves such a batch out.
        max_length (`int`, *optional*, defaults to 4096):
            Longest conversation in tokens, visual tokens included. None is ever cut through an image.
        on_too_long (`str`, *optional*, defaults to `"refuse"`):
            What to do with a longer one: `"refuse"`, it is a bad sample, or `"drop_turns"`, whole turns from its end.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            What to do with a sample that cannot be used: `"raise"` stops and names it; `"skip"` leaves it out, counts
            it, and lists it in `rejected_samples-<process>.jsonl` in `output_dir`.
        max_bad_share (`float`, *optional*, defaults to 0.01):
            The run stops when more than this share of an epoch's samples was skipped; of a stream, which does not say
            how many it has, of those so far and of a thousand at least.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`), warmup_steps (`float`, defaults to 0.03): The
            share of all steps that warm up.
        num_train_epochs (`float`, *optional*, defaults to 1.0).
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): A loss that is NaN is never hidden.
        remove_unused_columns (`bool`, *optional*, defaults to `False`): The collator reads messages and images itself.

    Raises:
        ValueError: if a choice is unknown, a learning rate is given for what the stage freezes,
            or an option of [`~trl.SFTConfig`] is set that cannot be kept with visual tokens.
    """

    stage: Literal["projector", "full"] = field(
        default="full", metadata={"help": "What is trained: 'projector' (stage 1) or 'full' (stage 2)."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the language model. Default: the paper's, scaled to the batch size."}
    )
    base_batch_size: int | None = field(
        default=None,
        metadata={"help": "Batch size that learning rates are meant for: scaled by sqrt(batch / base_batch_size)."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the projector. Default: learning_rate."}
    )
    vision_head_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the vision head. Default: learning_rate."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the vision tower. Default: the tower is frozen."}
    )
    visual_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the visual loss. Default: 0 in stage 'projector', else the model's."},
    )
    on_nonfinite_loss: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "On a NaN or infinite loss: 'raise', or 'skip' the optimisation step and count it."},
    )
    max_length: int | None = field(
        default=4096, metadata={"help": "Longest conversation in tokens, visual tokens included."}
    )
    on_too_long: Literal["refuse", "drop_turns"] = field(
        default="refuse", metadata={"help": "On a longer one: 'refuse', or 'drop_turns' from its end."}
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "On a sample that cannot be used: 'raise', or 'skip' and count it."}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "Stop when more than this share of the samples was skipped."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rates."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are NaN or infinite."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "The collator reads messages and images itself."}
    )

    def __post_init__(self):
        if self.stage not in ("projector", "full"):
            raise ValueError(f"stage is {self.stage!r}, expected 'projector' (stage 1) or 'full' (stage 2).")
        choices = {"on_nonfinite_loss": ("raise", "skip"), "on_bad_sample": ("raise", "skip")}
        choices["on_too_long"] = ("refuse", "drop_turns")
        for name, (one, other) in choices.items():
            if getattr(self, name) not in (one, other):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {one!r} or {other!r}.")
        if self.stage == "projector":
            for name in ("vision_head_learning_rate", "vision_tower_learning_rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set, but stage 'projector' freezes that module: use stage 'full'.")
        unsupported = {
            "packing": (self.packing, "TRL cannot pack conversations with images"),
            "padding_free": (self.padding_free, "TRL has no padding-free batches with images"),
            "label_smoothing_factor": (self.label_smoothing_factor, "it would smooth over visual tokens"),
            "loss_type": (self.loss_type != "nll", "the text loss is the paper's cross-entropy"),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "each loss is a mean over the labels of all devices",
            ),
        }
        for name, (is_set, reason) in unsupported.items():
            if is_set:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by VPiT: {reason}.")
        if self.learning_rate is None:
            self.learning_rate = PAPER_LEARNING_RATE
            self.base_batch_size = self.base_batch_size or PAPER_BATCH_SIZE
        # TRL's own dataset preparation would tokenize the text without its images.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # accelerate's default for streams joins batches of all processes, and cannot join the names in them.
            self.accelerator_config.dispatch_batches = False

    @property
    def learning_rate_scale(self) -> float:
        """What learning rates are multiplied by: the square-root rule of the released scripts, or 1."""
        if self.base_batch_size is None:
            return 1.0
        batch_size = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return math.sqrt(batch_size / self.base_batch_size)


__all__ = ["VPiTConfig"]
