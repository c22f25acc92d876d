"""Old import paths, kept for one release with a FutureWarning."""

import importlib
import sys
import warnings
from types import ModuleType


MOVED = {
    "grid_unet": ("small_visualizer",),
    "model_card_metamorph": ("model_cards",),
    "vpit_callbacks": ("vpit.callbacks",),
    "vpit_collator": ("vpit.collator", "image_reading", "data.formats"),
    "vpit_config": ("vpit.config",),
    "vpit_data": ("data.mixture",),
    "vpit_families": ("data.formats", "data.video"),
    "vpit_trainer": ("vpit.trainer", "vpit.stages", "vpit.collator", "data.precompute"),
}


class MovedModule(ModuleType):
    """A module whose names are looked up at their new paths."""

    def __getattr__(self, name: str):
        package, _, old = self.__name__.rpartition(".")
        for new in () if name.startswith("__") else MOVED[old]:
            module = importlib.import_module(f"{package}.{new}")
            if name in vars(module):
                message = f"{self.__name__}.{name} has moved to {module.__name__}: import it from there."
                warnings.warn(message, FutureWarning, stacklevel=2)
                return vars(module)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


for _old in MOVED:
    _module = sys.modules.setdefault(f"{__package__}.{_old}", MovedModule(f"{__package__}.{_old}"))
    setattr(sys.modules[__package__], _old, _module)
