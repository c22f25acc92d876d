import json

import pytest
import torch
from helpers import (
    EMOJI_CHECKPOINT,
    IMAGE,
    arguments,
    build_trainer,
    conversation,
    picture,
    text,
)
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from metamorph_hf import (
    LogSamplesCallback,
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
)
from metamorph_hf.vpit.callbacks import _format_content


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def test_prompts_in_the_form_of_openai():
    content = [{"type": "input_text", "text": "Make it red:"}, {"type": "input_image", "image_url": "cat.png"}]
    assert _format_content({"role": "user", "content": content}) == "Make it red: <image>"


class TestLogSamples:
    def test_answers_and_images_are_written(self, tiny_processor, tiny_model, tmp_path):
        """They are in the folder and in TensorBoard, and training is the same as without the callback."""
        pipe = MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT)
        examples = [conversation([text("draw a cat")], [IMAGE], [picture(0)])] * 2
        states = []
        for with_samples in (False, True):
            torch.manual_seed(0)
            model = MetaMorphForConditionalGeneration.from_pretrained(EMOJI_CHECKPOINT / "model", dtype="float32")
            model.config.visual_token_noise = 1.0
            args = arguments(tmp_path / str(with_samples), max_steps=3, report_to="tensorboard")
            trainer = build_trainer(model, pipe.processor, args, examples)
            if with_samples:
                callback = LogSamplesCallback(
                    trainer,
                    ["a red apple", "hello"],
                    2,
                    pipe,
                    max_new_tokens=pipe.model.config.num_image_tokens + 8,
                    decode_kwargs={"num_inference_steps": 2},
                )
                trainer.add_callback(callback)
            trainer.train()
            states.append(model.state_dict())
        folder = tmp_path / "True" / "samples"
        assert {path.name for path in folder.glob("*.json")} == {"step-000002.json", "step-000003.json"}
        apple, _ = json.loads((folder / "step-000002.json").read_text())
        assert apple["prompt"] == "a red apple"
        assert apple["answer"].count("<image>") == len(apple["images"]) == 1
        assert Image.open(folder / apple["images"][0]).size == pipe.default_size
        for run in (tmp_path / "True").rglob("events.out.tfevents.*"):
            events = event_accumulator.EventAccumulator(str(run))
            events.Reload()
            if "samples/0-0" in events.Tags()["images"]:
                assert [event.step for event in events.Images("samples/0-0")] == [2, 3]
                break
        else:
            pytest.fail("TensorBoard's files hold no image")
        for name, weight in states[0].items():
            assert torch.equal(weight, states[1][name]), name

    @pytest.mark.optional
    @pytest.mark.parametrize("tracker", ["wandb", "trackio"])
    def test_other_trackers(self, tmp_path, monkeypatch, tracker):
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": "", "TRACKIO_DIR": "", "WANDB_SILENT": "1"}.items():
            monkeypatch.setenv(name, value or str(tmp_path / "tracked"))
        (tmp_path / "tracked").mkdir()
        pytest.importorskip(tracker)
        pipe = MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
        examples = [conversation([text("draw a cat")], [IMAGE], [picture(0)])] * 2
        trainer = build_trainer(pipe.model, pipe.processor, arguments(tmp_path / "run", report_to=tracker), examples)
        options = {
            "max_new_tokens": pipe.model.config.num_image_tokens + 8,
            "decode_kwargs": {"num_inference_steps": 1},
        }
        trainer.add_callback(LogSamplesCallback(trainer, ["a red apple"], 1, pipe, **options))
        trainer.train()
        tracked = {path.resolve() for path in (tmp_path / "tracked").rglob("*.png")}
        assert [Image.open(path).size for path in tracked] == [pipe.default_size]

    def test_checkpointing_stays_as_it_was(self, tiny_processor, model, tmp_path):
        options = {"every_n_layers": 2, "use_reentrant": True}
        args = arguments(tmp_path, max_steps=1, activation_checkpointing=True, activation_checkpointing_kwargs=options)
        trainer = build_trainer(model, tiny_processor, args)
        trainer.add_callback(LogSamplesCallback(trainer, ["hello"], 1, max_new_tokens=2))
        found = []

        def look():
            layers = model.model.language_model.layers
            found.append([layer.gradient_checkpointing for layer in layers])
            found[-1] += [
                layer._gradient_checkpointing_func.keywords for layer in layers if layer.gradient_checkpointing
            ]

        training_step = trainer.training_step
        trainer.training_step = lambda *args: look() or training_step(*args)
        trainer.train()
        look()
        assert found[0] == found[1] and found[0][:2] == [False, True] and found[0][2]["use_reentrant"]

    def test_visualizer_of_another_model(self, tiny_processor, model, tmp_path):
        """Refused before the training, and not by the first image that is to be decoded."""
        pipe = MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT, model=None)
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path))
        with pytest.raises(ValueError, match="num_image_tokens is|visual_token_dim is 16, .* 192: they do not fit"):
            LogSamplesCallback(trainer, ["a cat"], 1, pipe)

    @pytest.mark.parametrize(("prompts", "every"), [([], 1), (["a cat"], 0)])
    def test_refused(self, tiny_processor, model, tmp_path, prompts, every):
        with pytest.raises(ValueError, match="at least one prompt"):
            LogSamplesCallback(build_trainer(model, tiny_processor, arguments(tmp_path)), prompts, every)
