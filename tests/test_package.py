"""The package as a whole: what importing it does to other libraries, and where old import paths lead."""

import importlib
import subprocess
import sys

import pytest
from helpers import EMOJI_CHECKPOINT

import metamorph_hf
from metamorph_hf import _moved_modules, cli


SNAPSHOT = """
import importlib
import pkgutil
import sys

LIBRARIES = ("transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "huggingface_hub", "torch")


def import_package():
    import metamorph_hf

    for module in pkgutil.walk_packages(metamorph_hf.__path__, "metamorph_hf."):
        if not module.name.startswith(("metamorph_hf.serving", "metamorph_hf.evaluation")):  # need other libraries
            importlib.import_module(module.name)


def library_modules():
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES}


def snapshot():
    found = {("sys", "meta_path"): list(sys.meta_path)}
    for name, module in library_modules().items():
        for key, value in vars(module).items():
            if not key.startswith("__"):
                found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, key, attribute): method for attribute, method in vars(value).items()}
    return found


if sys.argv[1] == "list":
    import_package()
    print("\\n".join(library_modules()))
else:
    for name in sys.stdin.read().split():
        importlib.import_module(name)
    before = snapshot()
    import_package()
    after = snapshot()
    caches = ("__abstractmethods__", "_abc_impl", "__annotations__", "__doc__")
    for key, value in before.items():
        if key[-1] not in caches and after.get(key) is not value and after.get(key) != value:
            print("changed:", *key)
    for key in after.keys() - before.keys():  # lazy modules add names of their own when they are first asked for
        if len(key) == 3 or str(getattr(after[key], "__module__", "")).split(".")[0] not in LIBRARIES:
            print("added:", *key)
"""


def run_snapshot(*arguments: str, **kwargs) -> str:
    command = [sys.executable, "-W", "ignore", "-c", SNAPSHOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout


@pytest.mark.slow
def test_importing_changes_nothing_in_other_libraries():
    """Every global and every class attribute of the libraries is what it was before the import."""
    modules = run_snapshot("list")
    assert "diffusers.pipelines.pipeline_utils" in modules and "trl.trainer.sft_trainer" in modules
    assert run_snapshot("compare", input=modules) == ""


def test_importing_needs_no_extra():
    """Neither the package nor the pipeline imports what the extras `serve` and `app` bring."""
    code = "import sys, metamorph_hf; metamorph_hf.MetaMorphPipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", "gradio", "fastapi", "openai", "prometheus_client"} & {*done.stdout.split()}


@pytest.mark.parametrize("name", ["serve", "app"])
def test_command_without_its_extra(name):
    """One sentence says what to install. The libraries are hidden, whether they are there or not."""
    hidden = "import sys; sys.modules |= {'ray': None, 'gradio': None}; from metamorph_hf import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", hidden, name, str(EMOJI_CHECKPOINT)], capture_output=True, text=True)
    assert done.returncode == 1 and f'pip install ".[{name}]"' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "old, name, new",
    [
        ("grid_unet", "GridUNet2DConditionModel", "small_visualizer"),
        ("model_card_metamorph", "create_model_card", "model_cards"),
        ("vpit_callbacks", "LogSamplesCallback", "vpit.callbacks"),
        ("vpit_collator", "DataCollatorForVPiT", "vpit.collator"),
        ("vpit_collator", "read_image", "image_reading"),
        ("vpit_config", "VPiTConfig", "vpit.config"),
        ("vpit_data", "load_mixture", "data.mixture"),
        ("vpit_families", "FAMILIES", "data.formats"),
        ("vpit_trainer", "VPiTTrainer", "vpit.trainer"),
        ("vpit_trainer", "complete_peft_config", "vpit.stages"),
        ("vpit_trainer", "precompute_visual_tokens", "data.precompute"),
    ],
)
def test_old_import_paths(old, name, new):
    module = importlib.import_module(f"metamorph_hf.{old}")
    with pytest.warns(FutureWarning, match=rf"metamorph_hf\.{old}\.{name} has moved to metamorph_hf"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"metamorph_hf.{new}"), name)
    assert old in _moved_modules.MOVED


def test_old_import_path_as_an_attribute():
    module = importlib.import_module("metamorph_hf.vpit_config")
    assert sys.modules["metamorph_hf"].vpit_config is module


def test_a_module_that_is_missing_without_an_extra(monkeypatch):
    """No extra has the name of this command."""
    monkeypatch.setitem(cli.COMMANDS, "generate", ("no_such_module", "fails"))
    with pytest.raises(SystemExit, match="^No module named 'no_such_module'$"):
        cli.main(["generate", "a cat"])


def test_old_import_path_without_such_a_name():
    with pytest.raises(ImportError, match="nothing"):
        exec("from metamorph_hf.vpit_trainer import nothing")


def test_public_names():
    for name in metamorph_hf.__all__:
        assert getattr(metamorph_hf, name).__module__.startswith("metamorph_hf.")
    assert set(metamorph_hf.__all__) <= set(dir(metamorph_hf))
