"""Configuration of Visual-Predictive Instruction Tuning (VPiT)."""

from dataclasses import dataclass, field
from typing import Literal

from trl import SFTConfig


@dataclass
class VPiTConfig(SFTConfig):
    r"""
    Configuration of [`VPiTTrainer`]. Parameters that [`~trl.SFTConfig`] has keep their meaning.

    Args:
        stage (`str`, *optional*, defaults to `"full"`):
            What is trained (paper, section 3.3): `"projector"` for stage 1, the projector alone, or `"full"` for
            stage 2, everything but the vision tower.
        max_length (`int`, *optional*, defaults to 4096):
            Longest conversation in tokens, visual tokens included. A longer one is refused, never cut.
        remove_unused_columns (`bool`, *optional*, defaults to `False`): The collator reads messages and images itself.
    """

    stage: Literal["projector", "full"] = field(
        default="full", metadata={"help": "What is trained: 'projector' (stage 1) or 'full' (stage 2)."}
    )
    max_length: int | None = field(
        default=4096, metadata={"help": "Longest conversation in tokens, visual tokens included."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "The collator reads messages and images itself."}
    )

    def __post_init__(self):
        if self.stage not in ("projector", "full"):
            raise ValueError(f"stage is {self.stage!r}, expected 'projector' (stage 1) or 'full' (stage 2).")
        # TRL's own dataset preparation would tokenize the text without its images.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()


__all__ = ["VPiTConfig"]
