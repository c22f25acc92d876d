"""MetaMorph in the Hugging Face tools: one autoregressive model of text and continuous visual tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from . import _moved_modules  # noqa: F401 (makes old import paths work)
from .configuration_metamorph import MetaMorphConfig
from .generation_metamorph import MetaMorphGenerationConfig, MetaMorphStreamer
from .modeling_metamorph import MetaMorphForConditionalGeneration, MetaMorphModel, MetaMorphPreTrainedModel
from .processing_metamorph import MetaMorphProcessor


if TYPE_CHECKING:
    from .pipeline_metamorph import MetaMorphPipeline, MetaMorphPipelineOutput
    from .small_visualizer import GridUNet2DConditionModel, PatchAutoencoder
    from .visual_token_projector import VisualTokenProjector
    from .vpit.callbacks import LogSamplesCallback
    from .vpit.config import VPiTConfig
    from .vpit.trainer import VPiTTrainer

__version__ = "0.2.0.dev0"

AutoConfig.register("metamorph", MetaMorphConfig, exist_ok=True)
AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)
# AutoModel returns the class that can generate, since people load checkpoints saved from it.
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MetaMorphConfig, MetaMorphForConditionalGeneration, exist_ok=True)

# Saved checkpoints carry their code, so that `trust_remote_code=True` loads them without this package.
MetaMorphConfig.register_for_auto_class()
MetaMorphForConditionalGeneration.register_for_auto_class("AutoModel")
MetaMorphProcessor.register_for_auto_class()

# diffusers and TRL take seconds to import, and TRL is an extra, so their modules load on first use.
_LAZY = {
    "GridUNet2DConditionModel": "small_visualizer",
    "LogSamplesCallback": "vpit.callbacks",
    "MetaMorphPipeline": "pipeline_metamorph",
    "MetaMorphPipelineOutput": "pipeline_metamorph",
    "PatchAutoencoder": "small_visualizer",
    "VPiTConfig": "vpit.config",
    "VPiTTrainer": "vpit.trainer",
    "VisualTokenProjector": "visual_token_projector",
}

__all__ = [
    "LogSamplesCallback",
    "MetaMorphConfig",
    "MetaMorphForConditionalGeneration",
    "MetaMorphGenerationConfig",
    "MetaMorphModel",
    "MetaMorphPipeline",
    "MetaMorphPipelineOutput",
    "MetaMorphPreTrainedModel",
    "MetaMorphProcessor",
    "MetaMorphStreamer",
    "GridUNet2DConditionModel",
    "PatchAutoencoder",
    "VPiTConfig",
    "VPiTTrainer",
    "VisualTokenProjector",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
