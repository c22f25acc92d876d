"""Lets `DiffusionPipeline.from_pretrained` load a saved [`MetaMorphPipeline`] by this package's classes.

diffusers has no registry for that: it looks a class up by its name in its own module, and one that comes with code
beside its weights it loads from there alone, if it is trusted. The package is, so it goes first. diffusers takes up to
seconds to import (it imports bitsandbytes, if installed), so it is waited for, not imported.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


PIPELINE_UTILS = "diffusers.pipelines.pipeline_utils"


class RegisterOnImport(MetaPathFinder):
    """Registers the pipeline as soon as somebody has imported diffusers' own."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == PIPELINE_UTILS else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                sys.meta_path.remove(self)
                register(module.DiffusionPipeline)

            spec.loader.exec_module = execute_and_register
        return spec


def register(diffusion_pipeline: type) -> None:
    """Wrap `DiffusionPipeline.load_config`, which every `from_pretrained` reads `model_index.json` with."""
    original = diffusion_pipeline.load_config.__func__

    def load_config(cls, *args, **kwargs):
        loaded = original(cls, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get("_class_name") in ("MetaMorphPipeline", ["pipeline_metamorph", "MetaMorphPipeline"]):
            from .pipeline_metamorph import OWN_MODULES, MetaMorphPipeline

            config["_class_name"] = MetaMorphPipeline.__name__
            for name, value in config.items():
                module = str(value[0]).removeprefix(f"{__package__}.") if isinstance(value, list) and value else None
                if module in OWN_MODULES:  # diffusers takes them from modules that are imported
                    config[name] = [import_module(f".{module}", __package__).__name__, value[1]]
        return loaded

    diffusion_pipeline.load_config = classmethod(load_config)
    import_module(".pipeline_metamorph", __package__)  # puts its class where diffusers looks


def register_in_diffusers() -> None:
    """Now, if diffusers' pipelines are imported already, else when they are."""
    if PIPELINE_UTILS in sys.modules:
        register(sys.modules[PIPELINE_UTILS].DiffusionPipeline)
    else:
        sys.meta_path.insert(0, RegisterOnImport())
