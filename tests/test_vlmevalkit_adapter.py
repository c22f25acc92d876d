"""The adapters of VLMEvalKit under base classes that do what its own do with messages before `generate_inner`."""

import os
import sys
from types import ModuleType

import pytest
import torch
from helpers import import_example

from metamorph_hf import MetaMorphPipeline


class Base:
    """What the base classes of VLMEvalKit (main and lite) ask of a model: the calls, and the forms of messages."""

    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None, **number):
        parts = [message] if isinstance(message, (str, dict)) else message
        kinds = {True: "image", False: "text"}
        parts = [{"type": kinds[os.path.exists(p)], "value": p} if isinstance(p, str) else p for p in parts]
        for part in parts:
            assert part["type"] in self.allowed_types
        return self.answer(parts, dataset, **number)

    def answer(self, parts, dataset):
        return self.generate_inner(parts, dataset)


class GenBase(Base):
    """The base class of the branch lite sets the seed, and takes a number of generations."""

    EXPERTISE = ["T2I"]

    def answer(self, parts, dataset, num_generations=1):
        torch.manual_seed(42)
        responses = self.batch_generate_inner(parts, dataset, num_generations)
        return responses[0] if len(responses) == 1 else responses


@pytest.fixture(params=["main", "lite"])
def adapter(request, monkeypatch):
    names = {"vlmeval.vlm.base": {"BaseModel": Base}, "vlmeval.ulm.base": {"BaseGenModel": GenBase}}
    for name, classes in names.items() if request.param == "lite" else [*names.items()][:1]:
        module = ModuleType(name)
        vars(module).update(classes)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("vlmeval", "vlmeval.vlm", *(["vlmeval.ulm"] if request.param == "lite" else [])):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "vlmevalkit_adapter", raising=False)
    module = import_example("vlmevalkit_adapter.py")
    assert issubclass(module.MetaMorphImages, GenBase if request.param == "lite" else Base)
    return module


@pytest.fixture
def folder(components, tmp_path):
    MetaMorphPipeline(**components).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def paths(tiny_images, tmp_path):
    for index, image in enumerate(tiny_images):
        image.save(tmp_path / f"{index}.png")
    return [str(tmp_path / f"{index}.png") for index in range(len(tiny_images))]


def test_text(adapter, folder, paths, components, tiny_processor, tiny_images):
    model = adapter.MetaMorph(str(folder), max_new_tokens=6)
    text = f"<|user|>{tiny_processor.image_token}a{tiny_processor.image_token}b?<|end|><|assistant|>"
    inputs = tiny_processor(text=text, images=[tiny_images[:2]], return_tensors="pt", add_special_tokens=False)
    ids = components["model"].generate(**inputs, max_new_tokens=6, do_sample=False, max_images=0)
    expected = tiny_processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate([paths[0], "a", paths[1], "b?"], dataset="MMBench_DEV_EN") == expected.strip()
    parts = [{"type": "image", "value": paths[0]}, {"type": "text", "value": "a"}]
    assert model.generate(parts) == model.generate(parts) != ""
    assert isinstance(model.generate("hello"), str)


def test_images(adapter, folder, paths):
    model = adapter.MetaMorphImages(str(folder), num_inference_steps=2, max_new_tokens=6)
    pipe = MetaMorphPipeline.from_pretrained(folder)
    options = {"num_inference_steps": 2, "max_new_tokens": 6, "generation_kwargs": {"force_image": True}}
    for message, call in (("a cat", ["a cat"]), ([paths[0], "make it red"], ["make it red", [paths[0]]])):
        torch.manual_seed(42)
        found = model.generate(message, dataset="GEdit")
        torch.manual_seed(42)
        (expected,) = pipe(*call, **options).images
        assert found.tobytes() == expected.tobytes()


def test_several_generations(adapter, folder):
    model = adapter.MetaMorphImages(str(folder), num_inference_steps=2, max_new_tokens=6)
    images = model.batch_generate_inner([{"type": "text", "value": "a cat"}], "GenEval", 3)
    assert len({image.tobytes() for image in images}) == 3
