"""MetaMorph in the Hugging Face tools: one autoregressive model of text and continuous visual tokens."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_metamorph import MetaMorphConfig
from .modeling_metamorph import MetaMorphForConditionalGeneration, MetaMorphModel, MetaMorphPreTrainedModel
from .processing_metamorph import MetaMorphProcessor


if TYPE_CHECKING:
    from .grid_unet import GridUNet2DConditionModel
    from .patch_vae import PatchVAE
    from .pipeline_metamorph import MetaMorphPipeline, MetaMorphPipelineOutput
    from .visual_token_projector import VisualTokenProjector
    from .vpit_config import VPiTConfig
    from .vpit_trainer import VPiTTrainer

__version__ = "0.1.0"

AutoConfig.register("metamorph", MetaMorphConfig, exist_ok=True)
AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)
# AutoModel gives the class that can generate: a checkpoint saved from it is what people load.
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MetaMorphConfig, MetaMorphForConditionalGeneration, exist_ok=True)

# diffusers and TRL take seconds to import and are extras for some users, so they load on first use.
_LAZY = {
    "MetaMorphPipeline": "pipeline_metamorph",
    "MetaMorphPipelineOutput": "pipeline_metamorph",
    "GridUNet2DConditionModel": "grid_unet",
    "PatchVAE": "patch_vae",
    "VisualTokenProjector": "visual_token_projector",
    "VPiTConfig": "vpit_config",
    "VPiTTrainer": "vpit_trainer",
}

__all__ = [
    "MetaMorphConfig",
    "MetaMorphForConditionalGeneration",
    "MetaMorphModel",
    "MetaMorphPipeline",
    "MetaMorphPipelineOutput",
    "MetaMorphPreTrainedModel",
    "MetaMorphProcessor",
    "GridUNet2DConditionModel",
    "PatchVAE",
    "VPiTConfig",
    "VPiTTrainer",
    "VisualTokenProjector",
]


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
