import copy
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import logging
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

from metamorph_hf import (
    GridUNet2DConditionModel,
    MetaMorphPipeline,
    MetaMorphPipelineOutput,
    PatchAutoencoder,
    VisualTokenProjector,
)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pipe(components):
    """A pipeline whose model answers every prompt with one image and nothing else."""
    config = components["model"].config
    start, end = config.image_start_token_id, config.image_end_token_id
    stop = config.text_config.eos_token_id
    components["model"].generation_config.sequence_bias = [[[start], 100.0], [[end, stop], 200.0]]
    return build(components)


def build(components, **kwargs) -> MetaMorphPipeline:
    settings = {"default_num_inference_steps": 2, "default_guidance_scale": 2.0}
    pipe = MetaMorphPipeline(**components, **{**settings, **kwargs})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_images(pipe, other) -> None:
    tokens = torch.randn(1, 4, 16)
    images = [p.decode_visual_tokens(tokens, generator=seeded(), output_type="pt") for p in (pipe, other)]
    assert torch.equal(*images)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def prompts_seen(pipe, monkeypatch):
    """The texts and the pixels that the model receives."""
    seen = []
    generate = type(pipe.model).generate

    def spy(model, **inputs):
        seen.append((pipe.processor.decode_generated(inputs["input_ids"]), inputs.get("pixel_values")))
        return generate(model, **inputs)

    monkeypatch.setattr(type(pipe.model), "generate", spy)
    return seen


@pytest.fixture
def warnings_of_pipeline(caplog):
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


class TestPrompts:
    def test_caption_is_wrapped_in_the_template(self, pipe, prompts_seen):
        output = pipe("a {red} apple", generator=seeded())
        assert isinstance(output, MetaMorphPipelineOutput)
        assert prompts_seen == [(["Generate an image of a {red} apple."], None)]
        assert [image.size for image in output.images] == [(8, 8)]
        assert output.text == ["<image>"]
        assert output.image_counts == [1]

    def test_no_template_sends_the_caption_as_it_is(self, pipe, prompts_seen):
        pipe.register_to_config(instruction_template=None)
        pipe("Generate an apple!")
        assert prompts_seen[0][0] == ["Generate an apple!"]

    def test_prompts_are_a_batch(self, pipe, prompts_seen):
        output = pipe(["a red apple", "a dog"])
        assert prompts_seen[0][0] == ["Generate an image of a red apple.", "Generate an image of a dog."]
        assert len(output.images) == 2
        assert output.image_counts == [1, 1]

    def test_image_comes_before_the_prompt_which_is_sent_as_it_is(self, pipe, prompts_seen, tiny_images):
        pipe("Make it red.", image=tiny_images[0])
        ((text, pixels),) = prompts_seen
        assert text == ["<image>Make it red."]
        assert pixels.shape == (1, 3, 16, 16)

    def test_one_entry_of_images_per_prompt(self, pipe, prompts_seen, tiny_images):
        pipe(["Make it red.", "Mix them."], image=[tiny_images[0], tiny_images[1:3]])
        ((text, pixels),) = prompts_seen
        assert text == ["<image>Make it red.", "<image><image>Mix them."]
        assert len(pixels) == 3

    def test_a_list_of_images_for_one_prompt(self, pipe, prompts_seen, tiny_images):
        pipe("Mix them.", image=tiny_images[:2])
        assert prompts_seen[0][0] == ["<image><image>Mix them."]

    def test_one_image_for_all_prompts(self, pipe, prompts_seen, tiny_images):
        pipe(["Make it red.", "Make it blue."], image=tiny_images[0])
        assert prompts_seen[0][0] == ["<image>Make it red.", "<image>Make it blue."]

    def test_paths_tuples_and_no_image(self, pipe, prompts_seen, tiny_images, tmp_path):
        tiny_images[0].save(tmp_path / "0.png")
        for image in (tmp_path / "0.png", (tmp_path / "0.png",)):
            pipe("b", image=image)
        pipe("b", image=[])
        pipe("b")
        assert torch.equal(prompts_seen[0][1], prompts_seen[1][1]) and prompts_seen[0][0] == prompts_seen[1][0]
        assert prompts_seen[2] == prompts_seen[3]

    def test_an_entry_does_not_depend_on_the_others(self, pipe, prompts_seen, tiny_images):
        pipe(["What is this?", "a cat", "a dog"], image=[tiny_images[0], None, [None]])
        pipe(["a cat", "a dog"], image=[None, None])
        wrapped = ["Generate an image of a cat.", "Generate an image of a dog."]
        assert [text for text, _ in prompts_seen] == [["<image>What is this?", *wrapped], wrapped]
        assert len(prompts_seen[0][1]) == 1 and prompts_seen[1][1] is None

    @pytest.mark.parametrize("form", ["path", "image"])
    def test_prepared_conversations_give_the_pixels_of_read_image(self, pipe, tmp_path, form):
        """Turned upright by EXIF and on white where it is transparent, as in training."""
        image, exif = Image.new("RGBA", (40, 20), (0, 0, 0, 0)), Image.Exif()
        image.paste((255, 0, 0, 255), (0, 0, 20, 10))
        exif[274] = 6
        image.save(tmp_path / "image.png", exif=exif)
        given = tmp_path / "image.png" if form == "path" else Image.open(tmp_path / "image.png")
        conversations = pipe.prepare_conversations("What is this?", given)
        inputs = pipe.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt"
        )
        pixels = np.full((40, 20, 3), 255, dtype=np.uint8)
        pixels[:20, 10:] = (255, 0, 0)
        expected = pipe.processor.image_processor([Image.fromarray(pixels)], return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])

    def test_template_with_other_braces(self, components, prompts_seen):
        pipe = build(components, instruction_template='{"generate": "{}"}')
        pipe("a {cat}")
        assert '{"generate": "a {cat}"}' in prompts_seen[0][0][0]

    def test_messages_are_one_conversation_or_several(self, pipe, prompts_seen, tiny_images):
        image = {"type": "image", "image": tiny_images[0]}
        conversation = [{"role": "user", "content": [{"type": "text", "text": "Look: "}, image]}]
        assert pipe(messages=conversation).image_counts == [1]
        assert pipe(messages=[conversation, [{"role": "user", "content": "Hello"}]]).image_counts == [1, 1]
        assert [text for text, _ in prompts_seen] == [["Look: <image>"], ["Look: <image>", "Hello"]]

    def test_messages_are_left_as_they_were(self, pipe, tiny_images):
        content = [{"type": "image", "image": tiny_images[0]}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        pipe(messages=messages)
        assert messages == [{"role": "user", "content": content}] and len(content) == 2


class TestAnswers:
    def test_several_images_in_one_answer(self, pipe):
        start = pipe.model.config.image_start_token_id
        again_and_again = {"sequence_bias": [[[start], 100.0]]}
        # An image takes 4 + 2 tokens, so that two of them just fit.
        output = pipe(["a dog", "a cat"], max_new_tokens=12, generation_kwargs=again_and_again)
        assert output.image_counts == [2, 2]
        assert output.text == ["<image><image>"] * 2
        assert len(output.images) == 4

    @pytest.mark.parametrize("output_type, empty", [("pil", []), ("np", (0, 8, 8, 3)), ("pt", (0, 3, 8, 8))])
    def test_no_image_warns_with_the_answer(self, components, warnings_of_pipeline, output_type, empty):
        pipe = build(components)
        start = components["model"].config.image_start_token_id
        kwargs = {"suppress_tokens": [start]}
        options = {"max_new_tokens": 3, "generation_kwargs": kwargs, "output_type": output_type}
        output = pipe("a dog", generator=[seeded()], **options)
        assert output.image_counts == [0]
        assert (output.images if output_type == "pil" else output.images.shape) == empty
        (record,) = warnings_of_pipeline.records
        assert record.getMessage() == f"Prompt 0 was answered without an image: {output.text[0]!r}"

    def test_no_image_in_several_answers(self, components, warnings_of_pipeline):
        kwargs = {"suppress_tokens": [components["model"].config.image_start_token_id]}
        kwargs |= {"num_return_sequences": 2, "do_sample": True}
        build(components)(["a dog", "a cat"], max_new_tokens=3, generation_kwargs=kwargs)
        prompts = [record.getMessage().split(" was")[0] for record in warnings_of_pipeline.records]
        assert prompts == ["Prompt 0", "Prompt 0", "Prompt 1", "Prompt 1"]

    def test_no_image_with_options_of_decoding(self, components):
        """Options for images do not cost the text of an answer without images."""
        start = components["model"].config.image_start_token_id
        options = {"max_new_tokens": 3, "generation_kwargs": {"suppress_tokens": [start]}}
        output = build(components)("a dog", latents=torch.randn(1, 3, 8, 8), **options)
        assert output.image_counts == [0] and len(output.text) == 1

    def test_beams_write_text(self, components):
        options = {"max_new_tokens": 3, "generation_kwargs": {"num_beams": 2, "max_images": 0}}
        output = build(components)(["a dog", "a cat"], **options)
        assert output.images == [] and len(output.text) == 2

    def test_a_single_criterion(self, components):
        pipe = build(components)
        kwargs = {"max_images": 0, "return_dict_in_generate": False}
        whole = pipe("a dog", max_new_tokens=8, generation_kwargs=kwargs).text[0]
        for criterion, expected in ((None, whole), (lambda ids, scores: True, whole[:1])):
            options = {"max_new_tokens": 8, "generation_kwargs": {**kwargs, "stopping_criteria": criterion}}
            assert pipe("a dog", **options).text == [expected]

    @pytest.mark.parametrize(
        ("kwargs", "sentence"),
        [
            ({"max_length": 9}, "`generation_kwargs` has max_length"),
            ({"max_new_tokens": 9}, "`generation_kwargs` has max_new_tokens"),
            ({"generation_config": GenerationConfig(max_new_tokens=3)}, "`generation_config` limits the answer"),
            ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, "`generation_kwargs` has input_ids"),
            ({"inputs_embeds": torch.zeros(1, 2, 32)}, "`generation_kwargs` has inputs_embeds"),
        ],
    )
    def test_arguments_of_the_call(self, components, kwargs, sentence):
        with pytest.raises(ValueError, match=sentence):
            build(components)("a dog", generation_kwargs=kwargs)

    def test_a_tuple_on_request(self, pipe):
        images, text, image_counts = pipe("a dog", return_dict=False)
        assert (len(images), text, image_counts) == (1, ["<image>"], [1])

    def test_output_types(self, pipe):
        outputs = {kind: pipe("a dog", generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt")}
        assert outputs["np"].shape == (1, 8, 8, 3) and outputs["pt"].shape == (1, 3, 8, 8)
        np.testing.assert_array_equal(np.asarray(outputs["pil"][0]), (outputs["np"][0] * 255).round().astype("uint8"))
        np.testing.assert_array_equal(outputs["pt"].permute(0, 2, 3, 1).numpy(), outputs["np"])
        assert pipe("a dog", output_type="latent").images.shape == (1, 3, 4, 4)


class TestDecoding:
    def test_decodes_the_visual_tokens_of_the_model(self, pipe):
        messages = [{"role": "user", "content": "Generate an image of a dog."}]
        conversation = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = pipe.processor(text=conversation, return_tensors="pt")
        answer = pipe.model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
        tokens = torch.cat(answer.visual_tokens)
        decoded = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="np")
        np.testing.assert_allclose(pipe("a dog", generator=seeded(), output_type="np").images, decoded, atol=1e-6)

    @pytest.mark.parametrize("form", [list, tuple, lambda rows: torch.cat(rows).numpy()])
    def test_forms_of_visual_tokens(self, pipe, form):
        """`generate` gives a tensor (images, N, V) for each answer."""
        rows, options = [torch.randn(2, 4, 16), torch.zeros(0, 4, 16), torch.randn(1, 4, 16)], {"output_type": "pt"}
        expected = pipe.decode_visual_tokens(torch.cat(rows), generator=seeded(), **options)
        torch.testing.assert_close(pipe.decode_visual_tokens(form(rows), generator=seeded(), **options), expected)
        torch.testing.assert_close(pipe.encode_visual_tokens(form(rows)), pipe.encode_visual_tokens(torch.cat(rows)))

    def test_before_the_first_call(self, pipe):
        assert (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps) == (2.0, True, 2)

    def test_guidance_starts_from_zeros(self, pipe, components):
        """One step, written out: the negative embeddings are zeros, as in the released code."""
        tokens = torch.nn.functional.normalize(torch.randn(2, 4, 16), dim=-1)
        settings = {"num_inference_steps": 1, "output_type": "latent"}
        latents = pipe.decode_visual_tokens(tokens, guidance_scale=3.0, generator=seeded(), **settings)
        scheduler, unet = components["scheduler"], components["unet"]
        scheduler.set_timesteps(1)
        noise = torch.randn(2, 3, 4, 4, generator=seeded())
        with torch.no_grad():
            states = components["projector"](tokens)
            assert states.shape == (2, 6, 8)
            with_tokens = unet(noise, scheduler.timesteps[0], states).sample
            without = unet(noise, scheduler.timesteps[0], torch.zeros(2, 6, 8)).sample
        prediction = without + 3.0 * (with_tokens - without)
        expected = scheduler.step(prediction, scheduler.timesteps[0], noise).prev_sample
        torch.testing.assert_close(latents, expected)

    def test_scale_one_does_not_double_the_batch(self, pipe):
        sizes = []

        def watch(call, step, timestep, tensors):
            sizes.append(len(tensors["prompt_embeds"]))
            return {}

        options = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        for scale in (1.0, 1.5):
            pipe.decode_visual_tokens(torch.randn(3, 4, 16), guidance_scale=scale, **options)
        assert sizes == [3, 3, 6, 6]

    def test_scaling_factor_is_undone(self, pipe):
        tokens = torch.randn(1, 4, 16)
        latents = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="latent")
        with torch.no_grad():
            pixels = pipe.vae.decode(latents / 0.7).sample
        decoded = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="pt")
        torch.testing.assert_close(decoded, (pixels / 2 + 0.5).clamp(0, 1))

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
    def test_generator_per_prompt_makes_images_independent_of_the_batch(self, pipe, scheduler):
        pipe.scheduler = scheduler(clip_sample=False)
        generators = [seeded(1), seeded(2)]
        together = pipe(["a dog", "a cat"], generator=generators, output_type="pt").images
        alone = pipe("a cat", generator=seeded(2), output_type="pt").images
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
        assert not torch.allclose(together[0], together[1])

    def test_generator_per_image(self, pipe):
        """As in diffusers. A single generator of a prompt serves its images in turn."""
        prompts, options = ["a dog", "a cat"], {"num_images_per_prompt": 2, "output_type": "pt"}
        four = pipe(prompts, generator=[seeded(n) for n in range(4)], **options).images
        for prompt, index in (("a dog", 0), ("a cat", 3)):
            alone = pipe(prompt, generator=seeded(index), output_type="pt").images
            torch.testing.assert_close(four[index : index + 1], alone, atol=1e-5, rtol=0)
        two = pipe(prompts, generator=[seeded(0), seeded(2)], **options).images
        torch.testing.assert_close(two[::2], four[::2], atol=1e-5, rtol=0)

    def test_a_generator_per_prompt_for_several_answers(self, pipe):
        options = {"generation_kwargs": {"do_sample": True, "num_return_sequences": 2}, "output_type": "pt"}
        first, again = (pipe(["a dog", "a cat"], generator=[seeded(0), seeded(1)], **options) for _ in range(2))
        assert first.image_counts == [1] * 4
        assert torch.equal(first.images, again.images)
        assert not torch.allclose(first.images[0], first.images[1])  # the same answer, other noise

    def test_same_seed_same_image(self, pipe):
        first, second, other = (pipe("a dog", generator=seeded(s), output_type="np").images for s in (0, 0, 1))
        np.testing.assert_array_equal(first, second)
        assert not np.allclose(first, other)

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
    def test_image_does_not_depend_on_the_batch(self, pipe, scheduler):
        """With a generator per image, callers who lack memory can decode a few images at a time."""
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        tokens, options = torch.randn(3, 4, 16), {"num_images_per_prompt": 2, "output_type": "pt"}
        whole = pipe.decode_visual_tokens(tokens, generator=[seeded(n) for n in range(3)], **options)
        assert whole.shape == (6, 3, 8, 8)
        assert not torch.allclose(whole[0], whole[1])
        alone = [pipe.decode_visual_tokens(tokens[n : n + 1], generator=[seeded(n)], **options) for n in range(3)]
        torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def test_latents_and_sizes(self, pipe):
        tokens, noise = torch.randn(1, 4, 16), torch.randn(1, 3, 4, 4, generator=seeded(3))
        given = pipe.decode_visual_tokens(tokens, latents=noise, output_type="pt")
        torch.testing.assert_close(given, pipe.decode_visual_tokens(tokens, generator=seeded(3), output_type="pt"))
        assert pipe.decode_visual_tokens(tokens, height=12, width=16)[0].size == (16, 12)

    def test_schedules(self, pipe):
        seen = []

        def watch(pipe, step, timestep, tensors):
            seen.append(int(timestep))
            return tensors

        tokens = torch.randn(1, 4, 16)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        pipe.decode_visual_tokens(tokens, timesteps=[900, 300, 10], callback_on_step_end=watch)
        assert seen == [900, 300, 10]
        with pytest.raises(ValueError, match="does not support custom sigmas"):
            pipe.decode_visual_tokens(tokens, sigmas=[1.0, 0.5])
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert len(pipe.decode_visual_tokens(tokens, sigmas=[10.0, 1.0, 0.0])) == 1
        with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas`"):
            pipe.decode_visual_tokens(tokens, timesteps=[1], sigmas=[1.0])

    def test_negative_visual_tokens(self, pipe):
        tokens, options = torch.randn(2, 4, 16), {"output_type": "pt"}
        plain = pipe.decode_visual_tokens(tokens, generator=seeded(), **options)
        away = pipe.decode_visual_tokens(tokens, negative_visual_tokens=tokens[1], generator=seeded(), **options)
        assert not torch.allclose(plain[0], away[0])
        same = pipe.decode_visual_tokens(tokens, guidance_scale=1.0, generator=seeded(), **options)
        torch.testing.assert_close(away[1], same[1], rtol=1e-4, atol=1e-5)  # away from itself leads nowhere

    def test_learned_unconditional_states(self, pipe, components):
        """Guidance leads away from them, as from negative tokens that the projector maps to the same states."""
        learned = VisualTokenProjector.from_config(components["projector"].config, learned_unconditional=True)
        weights = components["projector"].state_dict()
        tokens, away = torch.randn(2, 4, 16), torch.randn(4, 16)
        options = {"generator": seeded(), "output_type": "pt"}
        with torch.no_grad():
            learned.load_state_dict({**weights, "unconditional": components["projector"](away[None])[0]})
        expected = pipe.decode_visual_tokens(tokens, negative_visual_tokens=away, **options)
        components["projector"] = learned
        options["generator"] = seeded()
        torch.testing.assert_close(build(components).decode_visual_tokens(tokens, **options), expected)

    def test_reconstruct(self, pipe, tiny_images):
        pixels = pipe.processor.image_processor(tiny_images[:2], return_tensors="pt")["pixel_values"]
        tokens = pipe.model.get_visual_tokens(pixels)
        torch.testing.assert_close(pipe.get_visual_tokens(tiny_images[:2]), tokens)
        expected = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="pt")
        torch.testing.assert_close(pipe.reconstruct(tiny_images[:2], generator=seeded(), output_type="pt"), expected)

    def test_answering_has_a_progress_bar(self, pipe, capsys):
        pipe.set_progress_bar_config(disable=False)
        pipe("a cat", max_new_tokens=8)
        assert "Answering" in capsys.readouterr().err

    def test_freeu_and_slicing(self, pipe):
        tokens = torch.randn(2, 4, 16)
        plain = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="pt")
        pipe.enable_attention_slicing()
        pipe.vae.enable_slicing()
        sliced = pipe.decode_visual_tokens(tokens, generator=seeded(), output_type="pt")
        torch.testing.assert_close(sliced, plain, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"height": 7}, "`height` is 7, but must be a multiple of 2"),
            ({"latents": torch.zeros(1, 3, 5, 5)}, r"shape \(1, 3, 5, 5\), but must have shape \(2, 3, 4, 4\)"),
            ({"generator": [seeded()]}, "Got 1 generators for 2 prompts or images: pass one for each"),
            (
                {"generator": [seeded()] * 3, "num_images_per_prompt": 2},
                "Got 3 generators for 2 prompts or images: .* or one for each of their 2 decodings",
            ),
            ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be an integer of at least 1"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0, but must be an integer of at least 1"),
            ({"guidance_scale": float("nan")}, "`guidance_scale` is nan, but must be a finite number"),
            ({"eta": float("inf")}, "`eta` is inf, but must be a finite number"),
            ({"latents": torch.full((2, 3, 4, 4), float("nan"))}, "must be a tensor of finite values"),
            (
                {"negative_visual_tokens": torch.full((4, 16), float("inf"))},
                "must be a tensor of finite values",
            ),
            ({"visual_tokens": torch.full((2, 4, 16), float("inf"))}, "NaN or infinite"),
            ({"visual_tokens": torch.full((2, 4, 16), float("nan"))}, "NaN or infinite"),
            ({"visual_tokens": torch.zeros(2, 4, 15)}, r"Expected `visual_tokens` of shape \(images, 4, 16\)"),
            ({"visual_tokens": torch.zeros(4, 16)}, r"\(images, 4, 16\), but got \(4, 16\)"),
            ({"visual_tokens": "tokens"}, "must be a tensor, an array or a list of them"),
            ({"visual_tokens": [torch.zeros(1, 4, 16), None]}, "must be a tensor, an array or a list of them"),
            ({"visual_tokens": []}, "must be a tensor, an array or a list of them"),
            ({"negative_visual_tokens": torch.zeros(3, 4, 16)}, r"shape \(4, 16\) or \(2, 4, 16\)"),
            ({"negative_visual_tokens": "dog"}, "is 'dog', but must be a tensor"),
            ({"latents": 1}, "`latents` is 1, but must be a tensor"),
            ({"guidance_scale": [1.0, 2.0]}, r"`guidance_scale` is \[1.0, 2.0\], but must be a finite number"),
            ({"guidance_scale": float("inf")}, "`guidance_scale` is inf"),
            ({"eta": "0"}, "`eta` is '0', but must be a finite number"),
            ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5, but must be an integer"),
            ({"width": "8"}, "`width` is '8', but must be an integer of at least 1"),
            ({"generator": 0}, "`generator` is 0, but must be a torch.Generator or a list"),
            ({"sigmas": [1.0, 0.5]}, "does not support custom sigmas"),
        ],
    )
    def test_bad_input(self, pipe, options, reason):
        with pytest.raises(ValueError, match=reason):
            pipe.decode_visual_tokens(**{"visual_tokens": torch.randn(2, 4, 16), **options})

    def test_library_errors(self, pipe):
        tokens = torch.randn(2, 4, 16)
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_inference_step'"):
            pipe.decode_visual_tokens(tokens, num_inference_step=2)

    def test_none_means_the_default(self, pipe):
        tokens, options = torch.randn(1, 4, 16), {"output_type": "pt"}
        plain = pipe.decode_visual_tokens(tokens, generator=seeded(), **options)
        options |= dict.fromkeys(("num_inference_steps", "guidance_scale", "height", "eta", "num_images_per_prompt"))
        assert torch.equal(pipe.decode_visual_tokens(tokens, generator=seeded(), **options), plain)

    def test_callback_sees_and_changes_latents(self, pipe):
        steps = []

        def callback(pipeline, step, timestep, tensors):
            steps.append((step, sorted(tensors)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        names = ["latents", "prompt_embeds"]
        latents = pipe(
            "a dog",
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
        ).images
        assert steps == [(0, names), (1, names)]
        assert not latents.any()

    def test_diffusers_own_callbacks_work(self, pipe):
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
        tokens = torch.randn(1, 4, 16)
        settings = {"num_inference_steps": 4, "output_type": "latent"}
        guided = pipe.decode_visual_tokens(tokens, generator=seeded(), **settings)
        cut = pipe.decode_visual_tokens(tokens, generator=seeded(), callback_on_step_end=cutoff, **settings)
        assert not torch.allclose(guided, cut)

    def test_callback_may_end_guidance(self, pipe):
        """From then on, images are those of a scale of 1, and the next call is guided again."""

        def end_guidance(call, step, timestep, tensors):
            call._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]} if step == 0 else {}

        tokens, options = torch.randn(2, 4, 16), {"output_type": "latent", "timesteps": [900, 300]}
        pipe.scheduler = DDPMScheduler(clip_sample=False)
        ended = pipe.decode_visual_tokens(
            tokens,
            generator=seeded(),
            callback_on_step_end=end_guidance,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            **options,
        )
        guided = pipe.decode_visual_tokens(tokens, generator=seeded(), **options)
        unguided = pipe.decode_visual_tokens(tokens, generator=seeded(), guidance_scale=1.0, **options)
        assert not torch.allclose(ended, guided) and not torch.allclose(ended, unguided)

    @pytest.mark.parametrize("interrupted", ["the call", "the pipeline"])
    def test_interrupt(self, pipe, interrupted):
        steps = []

        def stop(call, step, timestep, tensors):
            steps.append(step)
            (call if interrupted == "the call" else pipe)._interrupt = True
            return {}

        options = {"num_inference_steps": 5, "callback_on_step_end": stop}
        for _ in range(2):  # the next call is not interrupted from the start
            pipe.decode_visual_tokens(torch.randn(1, 4, 16), **options)
        assert steps == [0, 0]

    def test_threads_share_a_pipeline(self, pipe):
        """Calls with settings of their own, whose steps take turns, give what each of them gives alone."""
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        tokens = torch.randn(2, 4, 16)
        settings = [
            {"guidance_scale": 1.0, "num_inference_steps": 4},
            {"guidance_scale": 5.0, "num_inference_steps": 8, "height": 12},
        ]

        def decode(index, **options):
            options |= {"generator": seeded(index), "output_type": "pt", **settings[index]}
            return pipe.decode_visual_tokens(tokens, **options)

        alone = [decode(0), decode(1)]
        barrier = threading.Barrier(2)

        def take_turns(call, step, timestep, tensors):
            assert call.guidance_scale == settings[len(call.scheduler.timesteps) // 8]["guidance_scale"]
            if step < 4:
                barrier.wait(timeout=60)
            return {}

        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda index: decode(index, callback_on_step_end=take_turns), range(2)))
        for expected, found in zip(alone, together):
            torch.testing.assert_close(found, expected)

    def test_half_precision(self, pipe):
        pipe.unet.to(torch.bfloat16)
        pipe.vae.to(torch.bfloat16)
        assert pipe("a dog").images[0].size == (8, 8)
        pipe.to(torch.float16)
        assert np.isfinite(pipe("a dog", output_type="np").images).all()

    def test_pixels_keep_their_precision_for_a_tower_in_float32(self, components, tiny_images, tmp_path):
        build(components).save_pretrained(tmp_path)
        pipe, seen = MetaMorphPipeline.from_pretrained(tmp_path, dtype=torch.float16), []
        tower = pipe.model.model.vision_tower
        tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        pipe("a dog", image=tiny_images[0])
        pipe.get_visual_tokens(tiny_images[0])
        assert seen[0].dtype == torch.float32 and torch.equal(*seen)

    def test_lora(self, pipe, tmp_path):
        """A LoRA of Stable Diffusion, whose layers of the text encoder are ignored."""
        tokens, options = torch.randn(1, 4, 16), {"output_type": "pt"}
        plain = pipe.decode_visual_tokens(tokens, generator=seeded(), **options)
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        with_lora = pipe.decode_visual_tokens(tokens, generator=seeded(), **options)
        layers = {f"unet.{name}": value for name, value in get_peft_model_state_dict(pipe.unet).items()}
        layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 8)
        save_file(layers, tmp_path / "pytorch_lora_weights.safetensors")
        pipe.unload_lora_weights()

        pipe.load_lora_weights(tmp_path)
        assert not torch.allclose(with_lora, plain)
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.decode_visual_tokens(tokens, generator=seeded(), **options), with_lora)
        pipe.unfuse_lora()
        torch.testing.assert_close(pipe.decode_visual_tokens(tokens, generator=seeded(), **options), with_lora)
        off = {**options, "cross_attention_kwargs": {"scale": 0.0}}
        torch.testing.assert_close(pipe.decode_visual_tokens(tokens, generator=seeded(), **off), plain)

        pipe.save_pretrained(tmp_path / "pipeline")
        again = MetaMorphPipeline.from_pretrained(tmp_path / "pipeline")
        for merged in (pipe, again):  # the pipeline in hand keeps its LoRA apart
            torch.testing.assert_close(merged.decode_visual_tokens(tokens, generator=seeded(), **options), with_lora)
        torch.testing.assert_close(pipe.decode_visual_tokens(tokens, generator=seeded(), **off), plain)
        pipe.unet.disable_adapters()
        pipe.save_pretrained(tmp_path / "disabled")
        without = MetaMorphPipeline.from_pretrained(tmp_path / "disabled")
        torch.testing.assert_close(without.decode_visual_tokens(tokens, generator=seeded(), **options), plain)
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), pipe.model)
        with pytest.raises(ValueError, match="The model has adapters, .*: merge them first"):
            pipe.save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other").exists()


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({}, "either `prompt` or `messages`, but got neither"),
            ({"prompt": "a dog", "messages": [{"role": "user", "content": "hi"}]}, "but got both"),
            ({"prompt": []}, "must be a string or a list of strings"),
            ({"prompt": 3}, "must be a string or a list of strings"),
            ({"messages": []}, "none of them empty"),
            ({"messages": {"role": "user", "content": "hi"}}, "none of them empty"),
            ({"messages": "hi"}, "none of them empty"),
            ({"messages": [[]]}, "none of them empty"),
            ({"messages": [{"role": "user", "content": "hi"}], "image": "x.png"}, "not passed as `image`"),
            ({"prompt": ["a", "b"], "image": ["x.png"]}, "Got 2 prompts but 1 entries in `image`"),
            ({"prompt": ["a", "b"], "generator": [seeded()]}, "Got 1 generators for 2 prompts"),
            ({"prompt": "a dog", "generator": []}, "Got 0 generators for 1 prompts"),
            ({"prompt": "a dog", "num_inference_steps": 0}, "`num_inference_steps` is 0"),
            ({"prompt": "a dog", "max_new_tokens": 0}, "`max_new_tokens` is 0, but must be an integer"),
            ({"prompt": "a dog", "max_new_tokens": "8"}, "`max_new_tokens` is '8', but must be an integer"),
            ({"prompt": "a dog", "output_type": "jpg"}, "must be one of pil, np, pt, latent"),
            (
                {"prompt": "a dog", "callback_on_step_end_tensor_inputs": ["noise"]},
                r"is \['noise'\], but must be a list of latents and prompt_embeds",
            ),
        ],
    )
    def test_inputs_are_checked_before_anything_runs(self, components, kwargs, message):
        with pytest.raises(ValueError, match=message):
            build(components)(**kwargs)

    @pytest.mark.parametrize(
        ("part", "change", "reason"),
        [
            ("projector", {"cross_attention_dim": 12}, "Projector's cross_attention_dim is 12, but the UNet2D"),
            ("projector", {"visual_token_dim": 12}, "Generation's visual_token_dim is 16, but the Visual"),
            (
                "vae",
                {"latent_channels": 4},
                "KL's latent_channels is 4, but the UNet2DConditionModel's in_channels is 3",
            ),
            (
                "vae",
                {"shift_factor": 0.1},
                "KL has {'shift_factor': 0.1}, which this pipeline does not support",
            ),
            (
                "unet",
                {"out_channels": 6},
                "Model's out_channels is 6, but the UNet2DConditionModel's in_channels is 3",
            ),
            (
                "unet",
                {
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 80,
                },
                "has {'addition_embed_type': 'text_time'}, which .* not of Stable Diffusion XL",
            ),
            ("unet", {"class_embed_type": "timestep"}, "has {'class_embed_type': 'timestep'}, which"),
            ("projector", {"num_image_tokens": 5}, "num_image_tokens is 4, but the VisualTokenProjector's .* is 5"),
        ],
    )
    def test_components_that_do_not_fit(self, components, part, change, reason):
        old = components[part]
        components[part] = type(old).from_config({**old.config, "_use_default_values": [], **change})
        with pytest.raises(ValueError, match=reason):
            build(components)

    @pytest.mark.parametrize("field", ["num_image_tokens", "image_token_id", "image_end_token_id"])
    def test_processor_of_another_model(self, components, field):
        components["processor"] = copy.copy(components["processor"])
        setattr(components["processor"], field, 9)
        with pytest.raises(ValueError, match=f"model's {field} is .*, but the processor's is 9"):
            build(components)

    def test_components_of_another_kind(self, components):
        flow = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="not for flow matching, but is a FlowMatchEuler"):
            build({**components, "scheduler": flow})
        unet = UNet2DModel(4, 3, 3, block_out_channels=(32,) * 4)
        with pytest.raises(ValueError, match="must be a UNet2DConditionModel, .* but is a UNet2DModel"):
            build({**components, "unet": unet})
        flux, ours = FluxPipeline(flow, components["vae"], *[None] * 5), {"projector": components["projector"]}
        with pytest.raises(ValueError, match="must be a UNet2DConditionModel, .* but is a NoneType"):
            MetaMorphPipeline.from_pipe(flux, model=None, processor=None, **ours)

    @pytest.mark.parametrize("decodes_only", [False, True])
    def test_from_another_pipeline_of_this_class(self, components, decodes_only):
        pipe = build(components | (dict.fromkeys(("model", "processor")) if decodes_only else {}))
        made = MetaMorphPipeline.from_pipe(pipe, default_guidance_scale=3.0)
        assert all(part is pipe.components[name] for name, part in made.components.items())
        assert (made.config.default_num_inference_steps, made.config.default_guidance_scale) == (2, 3.0)

    @pytest.fixture
    def stable(self, components) -> StableDiffusionPipeline:
        names = ("unet", "vae", "scheduler")
        return StableDiffusionPipeline(
            **{name: components[name] for name in names},
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def test_from_a_stable_diffusion_pipeline(self, components, stable):
        """A MetaMorph model replaces the text encoder, and the other components are taken over."""
        ours = {name: components[name] for name in ("model", "processor", "projector")}
        made = MetaMorphPipeline.from_pipe(stable, **ours, default_num_inference_steps=2)
        assert made.unet is components["unet"] and made.config.default_num_inference_steps == 2
        assert made("a cat").image_counts == [1]
        stable.register_to_config(_name_or_path="a/stable-diffusion")  # whose card is not that of the new pipeline
        assert MetaMorphPipeline.from_pipe(stable, **ours).config._name_or_path is None

    def test_template_without_braces(self, components):
        with pytest.raises(ValueError, match="needs a {} for the caption"):
            build(components, instruction_template="Generate it.")


class TestSaving:
    @pytest.mark.parametrize("template", ["Generate {}!", None])
    def test_round_trip(self, components, tmp_path, template):
        pipe = build(components, instruction_template=template)
        pipe.save_pretrained(tmp_path)
        again = MetaMorphPipeline.from_pretrained(tmp_path)
        assert type(again) is MetaMorphPipeline
        assert again.config.instruction_template == template
        assert again.config.default_num_inference_steps == 2
        assert {name: type(c) for name, c in again.components.items()} == {
            name: type(c) for name, c in pipe.components.items()
        }
        for name in ("model", "projector", "unet", "vae"):
            saved = getattr(again, name).state_dict()
            assert all(torch.equal(saved[key], value) for key, value in getattr(pipe, name).state_dict().items())
        assert_same_images(pipe, again)

    def test_diffusion_pipeline_needs_trust(self, components, tmp_path):
        """diffusers runs the code that comes with a pipeline, even if the package is installed."""
        pipe = build(components)
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(tmp_path)
        again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(again).__name__ == "MetaMorphPipeline"
        assert_same_images(pipe, again)

    def test_folder_without_an_index(self, tmp_path):
        with pytest.raises(OSError, match="no file named model_index.json found in directory"):
            MetaMorphPipeline.from_pretrained(tmp_path)

    def test_missing_component_folders(self, components, tmp_path):
        build(components).save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "unet")
        shutil.rmtree(tmp_path / "scheduler")
        with pytest.raises(FileNotFoundError, match="lacks the folders scheduler, unet named in its model_index.json"):
            MetaMorphPipeline.from_pretrained(tmp_path)
        given = {name: components[name] for name in ("unet", "scheduler")}
        assert MetaMorphPipeline.from_pretrained(tmp_path, **given).unet is components["unet"]

    def test_from_the_cache_of_the_hub(self, pipe, tmp_path):
        pipe.model.generation_config.eos_token_id = [5, 7]
        repository = tmp_path / "models--me--pipeline"
        pipe.save_pretrained(repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        options = {"cache_dir": tmp_path, "local_files_only": True}
        again = MetaMorphPipeline.from_pretrained("me/pipeline", **options)
        assert again.model.generation_config.eos_token_id == [5, 7]
        assert_same_images(pipe, again)

    def test_same_seed_same_image_after_saving(self, pipe, tmp_path):
        """In a batch or alone, before saving or after loading."""
        pipe.save_pretrained(tmp_path)
        again = MetaMorphPipeline.from_pretrained(tmp_path)
        prompts, generators = ["a dog", "a cat"], [seeded(1), seeded(2)]
        together = pipe(prompts, generator=generators, output_type="pt").images
        alone = again("a cat", generator=seeded(2), output_type="pt").images
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
        assert torch.equal(pipe("a cat", generator=seeded(2), output_type="pt").images, alone)

    def test_small_visualizer(self, components, tmp_path):
        """The emoji checkpoint has a small autoencoder, and a U-Net that needs an unpadded grid of tokens."""
        components["vae"] = PatchAutoencoder(latent_channels=3, patch_size=2, width=8, scaling_factor=0.5)
        projector = dict(components["projector"].config, sequence_length=None)
        components["projector"] = VisualTokenProjector.from_config(projector)
        components["unet"] = GridUNet2DConditionModel(
            sample_size=4,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=8,
            grid_channels=4,
        )
        pipe = build(components)
        pipe.save_pretrained(tmp_path)
        assert_same_images(pipe, MetaMorphPipeline.from_pretrained(tmp_path))
        # The name of the module before it was renamed
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["unet"] = ["grid_unet", "GridUNet2DConditionModel"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert_same_images(pipe, MetaMorphPipeline.from_pretrained(tmp_path))

    def test_optional_components_stay_absent(self, pipe, tmp_path):
        """As in the tests of diffusers, a pipeline answers without its optional components."""
        for name in pipe._optional_components:
            setattr(pipe, name, None)
        expected = pipe("a dog", generator=seeded(), output_type="pt").images
        pipe.save_pretrained(tmp_path)
        again = MetaMorphPipeline.from_pretrained(tmp_path)
        assert torch.equal(again("a dog", generator=seeded(), output_type="pt").images, expected)

    def test_absent_components_of_older_files(self, components, pipe, tmp_path, warnings_of_pipeline):
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert_same_images(pipe, MetaMorphPipeline.from_pretrained(tmp_path))
        assert not warnings_of_pipeline.records

    def test_without_a_model_it_only_decodes(self, components, tmp_path, tiny_images):
        components |= {"model": None, "processor": None}
        pipe = build(components)
        pipe.save_pretrained(tmp_path)
        again = MetaMorphPipeline.from_pretrained(tmp_path)
        assert_same_images(pipe, again)
        with pytest.raises(ValueError, match="can only decode visual tokens: pass both"):
            again("a dog")
        with pytest.raises(ValueError, match="can only decode visual tokens"):
            again.reconstruct(tiny_images[0])
        assert "pipe.decode_visual_tokens(visual_tokens)" in again.create_model_card("me/visualizer").text

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loads_in_half_precision(self, components, tmp_path, dtype):
        build(components).save_pretrained(tmp_path)
        pipe = MetaMorphPipeline.from_pretrained(tmp_path, dtype=dtype)
        assert {c.dtype for c in (pipe.model, pipe.projector, pipe.unet, pipe.vae)} == {dtype}
        pipe.set_progress_bar_config(disable=True)
        assert len(pipe("a dog", max_new_tokens=4).text) == 1

    def test_module_paths_in_the_index_are_frozen(self, components, tmp_path):
        build(components).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_metamorph", "MetaMorphPipeline"]
        assert index["model"] == ["modeling_metamorph", "MetaMorphForConditionalGeneration"]
        assert index["processor"] == ["processing_metamorph", "MetaMorphProcessor"]
        assert index["projector"] == ["visual_token_projector", "VisualTokenProjector"]

    def test_folders_of_before_there_was_code_in_them(self, components, tmp_path):
        pipe = build(components)
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        for name, value in index.items():
            if isinstance(value, list) and (tmp_path / name / f"{value[0]}.py").is_file():
                index[name] = [f"metamorph_hf.{value[0]}", value[1]]
        index["_class_name"] = "MetaMorphPipeline"
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        for file in tmp_path.rglob("*.py"):
            file.unlink()
        assert type(MetaMorphPipeline.from_pretrained(tmp_path).projector) is VisualTokenProjector


def test_import_is_light():
    """Packages that take seconds to import are loaded on first use, and their names are listed before."""
    code = (
        "import sys, metamorph_hf\nprint(*{name.partition('.')[0] for name in sys.modules} & "
        "{'bitsandbytes', 'diffusers', 'peft', 'trl'})\n"
        "assert set(metamorph_hf.__all__) <= set(dir(metamorph_hf))\n"
        "for name in metamorph_hf.__all__: getattr(metamorph_hf, name)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_import_changes_nothing_in_diffusers():
    code = """
import sys
from types import ModuleType
import diffusers

names = set(dir(diffusers))
before = dict(vars(diffusers.DiffusionPipeline))
import metamorph_hf
metamorph_hf.MetaMorphPipeline
assert dict(vars(diffusers.DiffusionPipeline)) == before
assert not [finder for finder in sys.meta_path if "metamorph" in str(getattr(finder, '__module__', ''))]
added = {name for name, value in vars(diffusers).items() if name not in names and not isinstance(value, ModuleType)}
assert not added, added
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class TestDownload:
    """A folder stands in for the Hub."""

    @pytest.fixture
    def downloaded(self, pipe, tmp_path, monkeypatch):
        """The folder of downloads from a repository with two variants of the pipeline and other files."""
        hub, cache = tmp_path / "hub", tmp_path / "cache" / COMMIT
        pipe.save_pretrained(hub)
        pipe.save_pretrained(hub, variant="fp16")
        for other in ("checkpoint-5/optimizer.bin", "grid.png", "model/pytorch_model.bin"):
            (hub / other).parent.mkdir(exist_ok=True)
            (hub / other).touch()
        files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]

        def snapshot_download(repo_id, allow_patterns=None, ignore_patterns=None, **kwargs):
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub / file, cache / file)
            return str(cache)

        diffusers_module = "diffusers.pipelines.pipeline_utils"
        siblings = [SimpleNamespace(rfilename=file) for file in files]
        monkeypatch.setattr(f"{diffusers_module}._resolve_revision", lambda *args, **kwargs: COMMIT)
        monkeypatch.setattr(f"{diffusers_module}.model_info", lambda *args, **kw: SimpleNamespace(siblings=siblings))
        monkeypatch.setattr(
            f"{diffusers_module}.hf_hub_download",
            lambda repo_id, name, **kwargs: Path(snapshot_download(repo_id, allow_patterns=[name])) / name,
        )
        for module in (diffusers_module, "metamorph_hf.pipeline_saving"):
            monkeypatch.setattr(f"{module}.snapshot_download", snapshot_download)
        return cache

    def test_the_pipeline_and_its_code_arrive(self, pipe, downloaded):
        assert_same_images(pipe, MetaMorphPipeline.from_pretrained("me/pipeline"))
        for file in ("model/generation_config.json", "model/configuration_metamorph.py", "pipeline_metamorph.py"):
            assert (downloaded / file).is_file()
        found = {str(path.relative_to(downloaded)) for path in downloaded.rglob("*")}
        assert not found & {"checkpoint-5", "grid.png", "model/pytorch_model.bin", "model/model.fp16.safetensors"}

    def test_a_variant(self, pipe, downloaded):
        assert_same_images(pipe, MetaMorphPipeline.from_pretrained("me/pipeline", variant="fp16"))
        weights = {path.name for path in downloaded.rglob("*.safetensors")}
        assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}

    def test_components_that_the_caller_passes(self, pipe, downloaded):
        again = MetaMorphPipeline.from_pretrained("me/pipeline", model=None, processor=None, unet=pipe.unet)
        assert again.model is None and again.unet is pipe.unet
        assert {path.parent.name for path in downloaded.rglob("*.safetensors")} == {"projector", "vae"}


class TestModelCard:
    @pytest.fixture
    def hub(self, monkeypatch):
        """The files that are pushed; `hub.card` is a card that is already there."""
        hub = SimpleNamespace(card=None, files={})

        def upload_folder(folder_path, **kwargs):
            hub.files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}
            hub.readme = (Path(folder_path) / "README.md").read_text() if "README.md" in hub.files else hub.card

        module = "metamorph_hf.pipeline_saving"
        monkeypatch.setattr(f"{module}.create_repo", lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(f"{module}.upload_folder", upload_folder)
        monkeypatch.setattr(f"{module}.file_exists", lambda *args, **kwargs: hub.card is not None)
        return hub

    @pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
    def test_push(self, pipe, hub, tmp_path, how):
        if how == "push_to_hub":
            pipe.push_to_hub("me/tiny-pipeline")
        else:
            pipe.save_pretrained(str(tmp_path / "tiny-pipeline"), push_to_hub=True, repo_id="me/tiny-pipeline")
        assert {"model_index.json", "pipeline_metamorph.py", "unet/config.json"} <= hub.files
        card = ModelCard(hub.readme)
        assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
        assert "4 per image, of width 16" in card.text and "images of 8x8 pixels" in card.text

    def test_its_code_runs(self, pipe, hub, tmp_path):
        pipe.save_pretrained(tmp_path)
        code = pipe.create_model_card(str(tmp_path)).text.split("```python\n")[1].split("```")[0]
        found = {}
        exec(f"{code}\nimage = {code.splitlines()[-1]}", found)
        assert found["image"].size == (8, 8)

    def test_card_travels_with_the_images_that_it_shows(self, pipe, hub, tmp_path, tiny_images):
        """Other images of the folder, files outside of it and linked files that are not shown stay private."""
        folder = tmp_path / "pipeline"
        pipe.save_pretrained(folder)
        (folder / "images").mkdir()
        for name in ("grid.png", "private.png", "images/a cat.png", "../outside.png"):
            tiny_images[0].save(folder / name)
        links = "![grid](grid.png 'A grid')\n![](../outside.png) ![](https://example.com/private.png)"
        links += f'\n<img width="8" src="images/a%20cat.png"> ![]({tmp_path}/outside.png) [file](private.png)'
        pipe.create_model_card("mine", links).save(folder / "README.md")
        MetaMorphPipeline.from_pretrained(folder).push_to_hub("me/tiny-pipeline")
        assert links in hub.readme
        assert {file for file in hub.files if file.endswith(".png")} == {"grid.png", "images/a cat.png"}

    def test_card_on_the_hub_is_kept(self, pipe, hub):
        hub.card = "---\nlicense: mit\n---\n# Mine\n"
        pipe.push_to_hub("me/tiny-pipeline")
        assert hub.readme == hub.card and "model_index.json" in hub.files


class TestOffloading:
    def test_the_models_move_in_before_they_run(self, pipe):
        """The hooks are those of `enable_model_cpu_offload`, but the CPU stands in for the accelerator."""
        from accelerate import cpu_offload_with_hook

        order, hook = [], None
        for name in pipe.model_cpu_offload_seq.split("->"):
            _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
            original = hook.hook.pre_forward

            def recorded(module, *args, name=name, original=original, **kwargs):
                order.append(name)
                return original(module, *args, **kwargs)

            hook.hook.pre_forward = recorded
        assert isinstance(pipe("a dog").images[0], Image.Image)
        assert list(dict.fromkeys(order)) == ["model", "projector", "unet", "vae"]
