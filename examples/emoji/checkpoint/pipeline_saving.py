"""Loading, saving and publishing of a pipeline whose code travels with its weights."""

import copy
import importlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists, snapshot_download, upload_folder
from transformers.dynamic_module_utils import custom_object_save


# The modules of this package whose classes a saved pipeline may name, and former names of them.
OWN_MODULES = (
    "modeling_metamorph",
    "pipeline_metamorph",
    "processing_metamorph",
    "small_visualizer",
    "visual_token_projector",
)
RENAMED_MODULES = {"grid_unet": "small_visualizer"}

CARD = """---
{{ card_data }}
---

# {{ name.split("/")[-1] }}

A [MetaMorph](https://arxiv.org/abs/2412.14164) pipeline: a latent diffusion U-Net decodes visual tokens
({{ projector.num_image_tokens or "any number" }} per image, of width {{ projector.visual_token_dim }})
into images of {{ pipe.default_size | join("x") }} pixels.

{{ description }}

With the package `metamorph_hf` installed:

```python
from metamorph_hf import MetaMorphPipeline

pipe = MetaMorphPipeline.from_pretrained("{{ name }}")
{% if pipe.model is none %}pipe.decode_visual_tokens(visual_tokens)[0]  # (images, tokens, width), from model.generate
{% else %}pipe("a red apple").images[0]
{% endif %}```
"""


class PipelineSavingMixin:
    """The part of [`MetaMorphPipeline`] that loads, saves and publishes it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "PipelineSavingMixin":
        """See [`DiffusionPipeline.from_pretrained`]. A folder without a component raises a `FileNotFoundError`."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():  # diffusers does not name a component that is missing
            named = cls.load_config(folder).keys() & set(cls._get_signature_keys(cls)[0]) - kwargs.keys()
            if missing := [name for name in sorted(named) if not (folder / name).is_dir()]:
                named = f"the folders {', '.join(missing)} named in its {cls.config_name}"
                raise FileNotFoundError(f"{folder} lacks {named}: pass the components, or copy the folder again.")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # A class name that comes with the name of a code file makes diffusers run that file instead of this class.
        index = super()._dict_from_json_file(json_file)
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        # Older files name absent components that no longer exist.
        return {name: value for name, value in index.items() if value != [None, None]}

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Read `model_index.json`, and resolve the modules of this package that it names. See [`ConfigMixin`]."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            module = str(value[0]).removeprefix("metamorph_hf.") if isinstance(value, list) else None
            module = RENAMED_MODULES.get(module, module)
            # Code that was copied with a checkpoint finds the other modules in its subfolders.
            if module in OWN_MODULES and __package__ == "metamorph_hf":
                # diffusers only finds modules that have been imported.
                config[name] = [importlib.import_module(f".{module}", __package__).__name__, value[1]]
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> Path:
        """See [`DiffusionPipeline.download`], which leaves out `generation_config.json` and part of the code."""
        folder = Path(super().download(pretrained_model_name, **kwargs))
        options = {name: kwargs.get(name) for name in ("cache_dir", "token")}
        options |= {name: kwargs.get(name, False) for name in ("force_download", "local_files_only")}
        patterns = ["*/generation_config.json", "*.py"]
        snapshot_download(pretrained_model_name, revision=folder.name, allow_patterns=patterns, **options)
        return folder

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Write `model_index.json`, and the code that `trust_remote_code=True` needs beside it and the components."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        for name, component in {"_class_name": self, **self.components}.items():
            module = type(component).__module__.rpartition(".")[2]
            if module in OWN_MODULES:
                custom_object_save(component, folder if component is self else folder / name)
                index[name] = [module, type(component).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | Path, *args, push_to_hub: bool = False, **kwargs) -> None:
        """
        Save the pipeline. See [`DiffusionPipeline.save_pretrained`]. LoRAs in the U-Net are merged into the weights
        that are saved, since diffusers cannot load them apart; adapters elsewhere raise a `ValueError`.
        """
        saved = copy.copy(self)
        for name in ("model", "projector", "unet", "vae"):
            component = self.components[name]
            if component is None or not any(".base_layer." in key for key in component.state_dict()):
                continue
            if name != "unet":
                raise ValueError(f"The {name} has adapters, and could not be loaded again: merge them first.")
            from peft.tuners.tuners_utils import BaseTunerLayer  # an extra, which adapters need anyway

            saved.unet = copy.deepcopy(component)
            layers = [module for module in saved.unet.modules() if isinstance(module, BaseTunerLayer)]
            if not any(layer.disable_adapters for layer in layers):
                saved.unet.fuse_lora()
            saved.unet.unload_lora()
        super(PipelineSavingMixin, saved).save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def create_model_card(self, name: str, description: str = "", base_model: str | None = None) -> ModelCard:
        """
        Create a model card for a pipeline that is loaded by `name`, such as `"user/pipeline"`, with `description` in
        Markdown. `base_model` is the Hub id of the pipeline that the U-Net was trained from.
        """
        tags = ["metamorph", "text-to-image", "diffusers"]
        data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, base_model=base_model)
        values = {"pipe": self, "projector": self.projector.config, "name": name, "description": description}
        return ModelCard.from_template(data, template_str=CARD, **values)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = "Upload MetaMorphPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        **save_kwargs,
    ) -> str:
        """
        Upload the pipeline to the Hub. See [`~utils.PushToHubMixin.push_to_hub`]. A repository without a `README.md`
        gets the card of the folder that the pipeline was loaded from, with the images that it shows, or a new card.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_kwargs)
            source = Path(os.path.abspath(self.config.get("_name_or_path") or folder))
            if subfolder is None and not file_exists(repo_id, "README.md", token=token):
                if (source / "README.md").is_file():
                    _copy_model_card(source, Path(folder))
                else:
                    self.create_model_card(repo_id).save(Path(folder) / "README.md")
            options = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
            return upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, **options)


def _copy_model_card(source: Path, target: Path) -> None:
    """Copy the `README.md` of a folder and the images in that folder that it shows, and no other file."""
    text = (source / "README.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(<?([^)\s>]+)", text) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)", text)
    for link in ["README.md", *map(unquote, links)]:
        file = Path(os.path.normpath(source / link))
        if file.is_file() and file.is_relative_to(source):  # a link may be an address, or lead out of the folder
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
