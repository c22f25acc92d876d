"""Methods of fast-moving libraries that this package overrides, so that a release that changes one is noticed."""

import importlib
import inspect
import pkgutil

import pytest

import metamorph_hf


LIBRARIES = ("transformers", "diffusers", "trl")


def find_overrides() -> dict[str, tuple[type, str]]:
    """Every underscore method of a library's class that a class of this package overrides."""
    found = {}
    for info in pkgutil.walk_packages(metamorph_hf.__path__, "metamorph_hf."):
        for own in vars(importlib.import_module(info.name)).values():
            if not isinstance(own, type) or own.__module__ != info.name:
                continue
            for name, value in vars(own).items():
                if name.startswith("__") or not name.startswith("_") or not inspect.isroutine(value):
                    continue
                for base in own.__mro__[1:]:
                    if name in vars(base) and base.__module__.split(".")[0] in LIBRARIES:
                        found[f"{base.__module__.split('.')[0]} {base.__name__}.{name}"] = (base, name)
                        break
    return found


# What each method took in the tested version.
SIGNATURES = {"transformers Trainer._save_rng_state": "self output_dir"}


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
