"""Methods of fast-moving libraries that this package overrides, so that a release that changes one is noticed."""

import importlib
import inspect
import pkgutil

import pytest

import metamorph_hf


PREFIX = "metamorph_hf."
LIBRARIES = ("transformers", "diffusers", "trl")
NEED_OTHER_LIBRARIES = ("metamorph_hf.serving", "metamorph_hf.evaluation")


def find_overrides() -> dict[str, tuple[type, str]]:
    """Every underscore method of a library's class that a class of this package, or a mixin of it, overrides."""
    names = [info.name for info in pkgutil.walk_packages(metamorph_hf.__path__, PREFIX)]
    modules = [importlib.import_module(name) for name in names if not name.startswith(NEED_OTHER_LIBRARIES)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    found = {}
    for own in classes:
        own_names = set()
        for base in own.__mro__:
            library = base.__module__.split(".")[0]
            if base.__module__.startswith(PREFIX):
                own_names |= {name for name in vars(base) if name.startswith("_") and not name.startswith("__")}
            elif library in LIBRARIES:
                overridden = [name for name in own_names if inspect.isroutine(getattr(base, name, None))]
                found |= {
                    f"{library} {base.__name__}.{name}": (base, name) for name in overridden if name in vars(base)
                }
    return found


# The parameters of each method in the tested version.
SIGNATURES = {
    "diffusers ConfigMixin._dict_from_json_file": ("json_file"),
    "transformers GenerationMixin._get_logits_processor": (
        "self generation_config input_ids_seq_length encoder_input_ids prefix_allowed_tokens_fn "
        "logits_processor device model_kwargs negative_prompt_ids negative_prompt_attention_mask"
    ),
    "transformers GenerationMixin._sample": (
        "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer model_kwargs"
    ),
    "transformers GenerationMixin._update_model_kwargs_for_generation": (
        "self outputs model_kwargs is_encoder_decoder num_new_tokens"
    ),
    "transformers GenerationMixin._validate_generation_mode": (
        "self generation_mode generation_config generation_mode_kwargs"
    ),
    "transformers ProcessorMixin._check_special_mm_tokens": ("self text text_inputs modalities"),
    "transformers Trainer._save_rng_state": ("self output_dir"),
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_signatures(method):
    base, name = find_overrides().get(method, (None, None))
    library = method.split()[0]
    assert base is not None, (
        f"{method} is overridden, but the installed {library} has no such method: find out what replaced it."
    )
    found = list(inspect.signature(getattr(base, name)).parameters)
    assert found == SIGNATURES[method].split(), (
        f"{method} now takes {found}, but took {SIGNATURES[method].split()}: check our override against {library}."
    )


def test_all_overrides_are_listed():
    assert set(find_overrides()) == set(SIGNATURES)


def test_overrides_of_transformers_stay_few():
    assert sum(method.startswith("transformers ") for method in SIGNATURES) <= 6
