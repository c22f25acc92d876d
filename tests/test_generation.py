import copy
import math
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PLACEHOLDER
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import DeferredStopCheck
from transformers.utils import is_torchvision_available

from metamorph_hf import MetaMorphGenerationConfig, MetaMorphStreamer


N = 16
IMAGE, IMAGE_START, IMAGE_END = PLACEHOLDER, 222, 223
EOS = (209, 217)
PAD = 209
GREEDY = ("text_after_image_prompt", "one_image", "image_prompt_image_answer", "two_images")


def expand(ids):
    return [token for i in ids for token in ([IMAGE] * N if i == -200 else [i])]


def without_placeholders(ids):
    return [token for token in ids if token != IMAGE]


@pytest.fixture(scope="module")
def prompt(golden, golden_image_processor):
    """Return a function that makes the prompt of a golden greedy run, as generate() takes it."""

    def make(case):
        facts = golden.facts["greedy"][case]
        inputs = {"input_ids": torch.tensor([expand(facts["prompt"])])}
        if facts["image_files"]:
            images = [golden.images[name] for name in facts["image_files"]]
            inputs["pixel_values"] = golden_image_processor(images, return_tensors="pt").pixel_values
        return inputs

    return make


@pytest.fixture(scope="module")
def batch(prompt):
    """Return four prompts of two lengths, padded on the left, which are answered with 0, 1, 1 and 2 images."""
    prompts = [prompt(case) for case in GREEDY]
    return join(prompts)


def join(prompts):
    length = max(inputs["input_ids"].shape[1] for inputs in prompts)
    rows = [inputs["input_ids"][0].tolist() for inputs in prompts]
    pixel_values = [inputs["pixel_values"] for inputs in prompts if "pixel_values" in inputs]
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        **({"pixel_values": torch.cat(pixel_values)} if pixel_values else {}),
    }


def generate(model, inputs, **kwargs):
    defaults = {"do_sample": False, "max_new_tokens": 80, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**defaults, **kwargs})


def answers(outputs, inputs):
    """Return the new ids of each row, up to its end."""
    rows = []
    for row in outputs.sequences[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [index for index, token in enumerate(row) if token in EOS]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def assert_same(outputs, expected):
    assert outputs.sequences.tolist() == expected.sequences.tolist()
    for tokens, expected_tokens in zip(outputs.visual_tokens, expected.visual_tokens):
        torch.testing.assert_close(tokens, expected_tokens, rtol=0, atol=1e-5)


@torch.no_grad()
def plain_greedy(model, inputs, max_new_tokens=80):
    """
    Decode one prompt by the released rules in their simplest form: everything is read again at each step, images are
    forced to their end, and none begins that does not fit.
    """
    base = model.model
    embeds = base.language_model.embed_tokens(inputs["input_ids"])
    if "pixel_values" in inputs:
        embeds[inputs["input_ids"] == IMAGE] = base.projector(base.get_visual_tokens(inputs["pixel_values"])).flatten(
            0, 1
        )
    ids, visual_tokens, left = [], [], 0
    while True:
        hidden = base.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        if left:
            visual_tokens.append(torch.nn.functional.normalize(model.vision_head(hidden), dim=-1))
            embeds = torch.cat([embeds, base.projector(visual_tokens[-1])[:, None]], dim=1)
            ids.append(IMAGE)
            left -= 1
            continue
        if len(ids) >= max_new_tokens:
            break
        if ids and ids[-1] == IMAGE:
            token = IMAGE_END
        else:
            logits = model.lm_head(hidden)[0]
            logits[[IMAGE, IMAGE_END]] = -torch.inf
            if len(ids) + N + 2 > max_new_tokens:
                logits[IMAGE_START] = -torch.inf
            token = logits.argmax().item()
        ids.append(token)
        if token in EOS:
            break
        left = N if token == IMAGE_START else 0
        embeds = torch.cat([embeds, base.language_model.embed_tokens(torch.tensor([[token]]))], dim=1)
    return ids, torch.cat(visual_tokens).view(-1, N, 32) if visual_tokens else torch.zeros(0, N, 32)


class TestReleasedGreedy:
    """Compare with the released implementation's own decoding loop."""

    @pytest.mark.parametrize("case", [*GREEDY, "image_end_then_image_again_adjacent"])
    def test_same_answer(self, golden, golden_model, prompt, case):
        facts, inputs = golden.facts["greedy"][case], prompt(case)
        outputs = generate(golden_model, inputs, output_logits=True)
        (ids,) = answers(outputs, inputs)
        assert without_placeholders(ids) == facts["generated_ids"]
        assert ["v" if token == IMAGE else "t" for token in ids] == list(facts["trace"])
        visual_tokens = golden.tensors[f"greedy.{case}.image_embeds"].view(-1, N, 32)
        assert outputs.visual_tokens[0].shape == visual_tokens.shape
        torch.testing.assert_close(outputs.visual_tokens[0], visual_tokens, rtol=0, atol=5e-6)
        step_logits = golden.tensors.get(f"greedy.{case}.step_logits")
        if step_logits is not None:
            for step, kind in enumerate(facts["trace"]):
                if kind == "t":  # at visual steps the released code stores logits of the token it feeds back
                    error = (outputs.logits[step][0, :PLACEHOLDER] - step_logits[step]).abs().max()
                    assert error < 1e-5 * step_logits.abs().max()

    @pytest.mark.parametrize("case", ["stop_inside_image", "stop_at_first_visual_token"])
    def test_we_begin_no_image_that_does_not_fit(self, golden, golden_model, prompt, case):
        """In the released code, `max_new_tokens` ends in the middle of an image, and one step late."""
        facts, inputs = golden.facts["greedy"][case], prompt(case)
        outputs = generate(golden_model, inputs, max_new_tokens=facts["max_new_tokens"])
        (ids,) = answers(outputs, inputs)
        begin = facts["generated_ids"].index(IMAGE_START)
        assert ids[:begin] == facts["generated_ids"][:begin] and IMAGE_START not in ids
        assert len(ids) <= facts["max_new_tokens"] and len(outputs.visual_tokens[0]) == 0
        longer = generate(golden_model, inputs, max_new_tokens=begin + N + 2)
        assert answers(longer, inputs) == [[*facts["generated_ids"], *[IMAGE] * N, IMAGE_END]]
        released = golden.tensors[f"greedy.{case}.image_embeds"]
        torch.testing.assert_close(longer.visual_tokens[0][0, : len(released)], released, rtol=0, atol=5e-6)

    def test_we_ignore_the_text_head_inside_an_image(self, golden, golden_model, prompt):
        """In the released code, an end-of-text argmax of lm_head(projector(v)) ends it after 6 visual tokens."""
        case = "eos_argmax_inside_image"
        inputs, released = prompt(case), golden.tensors[f"greedy.{case}.image_embeds"]
        outputs = generate(golden_model, inputs, max_new_tokens=2 + N + 1)
        assert answers(outputs, inputs) == [[95, IMAGE_START, *[IMAGE] * N, IMAGE_END]]
        assert len(released) == 6
        torch.testing.assert_close(outputs.visual_tokens[0][0, :6], released, rtol=0, atol=5e-6)

    def test_we_close_every_image(self, golden, golden_model, prompt):
        """In the released code, without a predicted <image_end> the next <image_start> gives no visual token."""
        case = "no_image_end_after_image"
        inputs, released = prompt(case), golden.tensors[f"greedy.{case}.image_embeds"]
        outputs = generate(golden_model, inputs, max_new_tokens=2 + N + 1)
        assert golden.facts["greedy"][case]["generated_ids"][:4] == [92, IMAGE_START, 71, IMAGE_START]
        assert answers(outputs, inputs) == [[92, IMAGE_START, *[IMAGE] * N, IMAGE_END]]
        torch.testing.assert_close(outputs.visual_tokens[0][0], released[:N], rtol=0, atol=5e-6)


class TestDecoding:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_against_a_plain_loop(self, golden, golden_model, prompt, use_cache):
        for case in golden.facts["greedy"]:
            inputs = prompt(case)
            ids, visual_tokens = plain_greedy(golden_model, inputs, max_new_tokens=50)
            outputs = generate(golden_model, inputs, max_new_tokens=50, use_cache=use_cache)
            assert answers(outputs, inputs) == [ids], case
            torch.testing.assert_close(outputs.visual_tokens[0], visual_tokens, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
    def test_batch_equals_one_by_one(self, golden_model, prompt, batch, kwargs):
        outputs = generate(golden_model, batch, **kwargs)
        alone = [plain_greedy(golden_model, prompt(case)) for case in GREEDY]
        assert answers(outputs, batch) == [ids for ids, _ in alone]
        assert [len(tokens) for tokens in outputs.visual_tokens] == [0, 1, 1, 2]
        for tokens, (_, expected) in zip(outputs.visual_tokens, alone):
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        assert not outputs.unfinished_images.any()

    @pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}])
    def test_max_new_tokens_is_a_hard_limit(self, golden_model, prompt, batch, kwargs):
        for max_new_tokens in (1, 3, 19, 21, 22, 24, 40):
            outputs = generate(golden_model, batch, max_new_tokens=max_new_tokens, **kwargs)
            alone = [plain_greedy(golden_model, prompt(case), max_new_tokens) for case in GREEDY]
            new = outputs.sequences[:, batch["input_ids"].shape[1] :].tolist()
            assert len(new[0]) <= max_new_tokens
            for row, (ids, _) in zip(new, alone):
                assert row == ids + [PAD] * (len(row) - len(ids))
            for tokens, (_, expected) in zip(outputs.visual_tokens, alone):
                torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
            assert not outputs.unfinished_images.any()

    @pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}])
    def test_chunked_prefill(self, golden_model, prompt, kwargs):
        inputs = prompt("image_prompt_image_answer")
        for size in (5, 11):  # through the middle of the prompt's image
            outputs = generate(golden_model, inputs, prefill_chunk_size=size, **kwargs)
            assert_same(outputs, generate(golden_model, inputs))

    def test_eager_attention_is_causal(self, golden, prompt, golden_model):
        """The released code attends to the future under eager attention."""
        model = golden.build_model()
        model.set_attn_implementation("eager")
        assert_same(generate(model, prompt("one_image")), generate(golden_model, prompt("one_image")))

    def test_prompt_ends_with_image_start(self, golden_model):
        row = torch.tensor([[208, 208, 92, 151, IMAGE_START]])
        outputs = generate(golden_model, {"input_ids": row}, max_new_tokens=N + 1)
        assert answers(outputs, {"input_ids": row}) == [[IMAGE] * N + [IMAGE_END]]
        with pytest.raises(ValueError, match=f"takes {N + 1} more tokens, but only {N} fit.*max_new_tokens={N + 1}"):
            generate(golden_model, {"input_ids": row}, max_new_tokens=N)

    @pytest.mark.parametrize("length", [1, N - 1])
    def test_prompt_ends_inside_an_image(self, golden_model, length):
        row = torch.tensor([[208, 92, IMAGE_START, *[IMAGE] * length]])
        with pytest.raises(ValueError, match=f"has {length} image token positions, but the images fill 0"):
            generate(golden_model, {"input_ids": row})
        # It is refused even where the counts happen to agree.
        row = torch.tensor([[208, *[IMAGE] * (N - length), IMAGE_START, *[IMAGE] * length]])
        with pytest.raises(ValueError, match=r"Prompts \[0\] end inside an image: it takes 16"):
            generate(golden_model, {"input_ids": row, "visual_tokens": torch.zeros(1, N, 32)})

    def test_prompt_ends_before_image_end(self, golden_model, prompt):
        """A whole image without <image_end> is closed."""
        inputs = prompt("image_prompt_image_answer")
        end = inputs["input_ids"][0].tolist().index(IMAGE_END)
        cut = {**inputs, "input_ids": inputs["input_ids"][:, :end]}
        assert generate(golden_model, cut, max_new_tokens=1).sequences[0, -1].item() == IMAGE_END

    @pytest.mark.parametrize("form", [list, tuple, np.array, lambda rows: [np.array(row) for row in rows]])
    def test_forms_of_visual_tokens(self, golden_model, batch, form):
        """A tensor, an array, or a list or tuple of either, with an entry per row, mean the same images."""
        inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        visual_tokens = golden_model.get_visual_tokens(batch["pixel_values"]).detach()
        expected = golden_model.generate(**inputs, visual_tokens=visual_tokens, max_new_tokens=3)
        given = form(visual_tokens[:, None].cpu())
        given = given[:, 0] if isinstance(given, np.ndarray) else given
        assert torch.equal(golden_model.generate(**inputs, visual_tokens=given, max_new_tokens=3), expected)

    @pytest.mark.parametrize("given", [[], "x", [None], np.array(2), torch.full((1, 4, 16), torch.nan)])
    def test_visual_tokens_of_no_form(self, golden_model, batch, given):
        with pytest.raises(ValueError, match="`visual_tokens`"):
            golden_model.generate(batch["input_ids"], visual_tokens=given)

    def test_visual_tokens_stand_for_pixels(self, golden_model, batch):
        with torch.no_grad():
            visual_tokens = golden_model.get_visual_tokens(batch["pixel_values"])
        encoded = {**batch, "visual_tokens": visual_tokens}
        with pytest.raises(ValueError, match="Images are given twice"):
            generate(golden_model, encoded)
        encoded.pop("pixel_values")
        several = {**encoded, "visual_tokens": list(visual_tokens.split(1))}  # as an earlier answer gives them
        for inputs, kwargs in ((encoded, {}), (encoded, {"use_cache": False}), (several, {})):
            assert_same(generate(golden_model, inputs, **kwargs), generate(golden_model, batch))

    def test_one_image_at_several_positions(self, golden_model, prompt):
        inputs = prompt("image_prompt_image_answer")
        twice = {"input_ids": inputs["input_ids"].repeat(2, 1), "image_indices": torch.tensor([0, 0])}
        with torch.no_grad():
            visual_tokens = golden_model.get_visual_tokens(inputs["pixel_values"])
        expected = generate(golden_model, inputs)
        for image in ({"pixel_values": inputs["pixel_values"]}, {"visual_tokens": visual_tokens}):
            outputs = generate(golden_model, {**twice, **image})
            assert answers(outputs, inputs) == 2 * answers(expected, inputs)

    @pytest.mark.parametrize("kwargs", [{}, {"num_return_sequences": 2, "do_sample": True}])
    @pytest.mark.parametrize("count", [0, 2, 4])
    def test_number_of_images(self, golden_model, batch, kwargs, count):
        """The prompts have three images."""
        inputs = {**batch, "pixel_values": batch["pixel_values"][:1].repeat(count, 1, 1, 1)}
        if count == 0:
            del inputs["pixel_values"]
        with pytest.raises(ValueError, match=f"image token positions, but the images fill {count * N} "):
            generate(golden_model, inputs, **kwargs)

    def test_embeddings_stand_for_ids(self, golden_model, prompt):
        inputs = prompt("two_images")
        embeds = golden_model.get_input_embeddings()(inputs["input_ids"]).detach()
        outputs = generate(golden_model, {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]})
        expected = generate(golden_model, inputs)
        assert outputs.sequences.tolist() == expected.sequences[:, embeds.shape[1] :].tolist()
        torch.testing.assert_close(outputs.visual_tokens[0], expected.visual_tokens[0], rtol=0, atol=1e-5)

    def test_empty_prompt(self, golden_model):
        with pytest.raises(ValueError, match="The prompt is empty"):
            generate(golden_model, {"input_ids": torch.zeros(1, 0, dtype=torch.long)})

    def test_second_turn_on_the_same_cache(self, golden_model, prompt):
        inputs, cache = prompt("two_images"), DynamicCache()
        first = generate(golden_model, inputs, cache=cache)
        question = torch.cat([first.sequences, torch.tensor([[92, 151, 25, IMAGE_START]])], dim=1)
        continued = generate(golden_model, {"input_ids": question}, cache=cache, max_new_tokens=N + 3)
        with torch.no_grad():
            read = golden_model.get_visual_tokens(inputs["pixel_values"])
        everything = {"input_ids": question, "visual_tokens": torch.cat([read, first.visual_tokens[0]])}
        assert_same(continued, generate(golden_model, everything, max_new_tokens=N + 3))
        assert len(continued.visual_tokens[0]) == 1

    def test_new_tokens_alone_on_a_cache(self, golden_model, prompt):
        """They come with the mask of all tokens, as transformers takes them; all count in the context."""
        inputs, cache = prompt("two_images"), DynamicCache()
        first = generate(golden_model, inputs, cache=cache)
        new = torch.tensor([[92, 151, 25, IMAGE_START]])
        whole = torch.cat([first.sequences, new], dim=1)
        unread = whole[:, cache.get_seq_length() :]  # the cache has not read the answer's last token
        options = {"max_new_tokens": N + 3, "attention_mask": torch.ones_like(whole)}
        continued = generate(golden_model, {"input_ids": unread}, cache=copy.deepcopy(cache), **options)
        expected = generate(golden_model, {"input_ids": whole}, cache=copy.deepcopy(cache), **options)
        assert continued.sequences[:, unread.shape[1] :].tolist() == expected.sequences[:, whole.shape[1] :].tolist()
        assert len(continued.visual_tokens[0]) == 1
        torch.testing.assert_close(continued.visual_tokens[0], expected.visual_tokens[0])
        context = golden_model.config.text_config.max_position_embeddings
        golden_model.config.text_config.max_position_embeddings = whole.shape[1] + N - 1
        try:
            with pytest.raises(ValueError, match=f"takes {N + 1} more tokens, but only {N} fit after the prompt"):
                generate(golden_model, {"input_ids": unread}, cache=cache, **options)
        finally:
            golden_model.config.text_config.max_position_embeddings = context
        with pytest.raises(ValueError, match="`attention_mask` has shape"):  # without a cache it is an error
            generate(golden_model, {"input_ids": unread}, **options)

    def test_old_name_of_the_cache(self, golden_model):
        prompt, cache = {"input_ids": torch.tensor([[208, 92, IMAGE_START]])}, DynamicCache()
        first = generate(golden_model, prompt, cache=cache, max_new_tokens=N + 2)
        question = {"input_ids": torch.cat([first.sequences, torch.tensor([[92, 151]])], dim=1)}
        expected = generate(golden_model, question, cache=copy.deepcopy(cache), max_new_tokens=3)
        with pytest.warns(FutureWarning, match="past_key_values"):
            continued = generate(golden_model, question, past_key_values=cache, max_new_tokens=3)
        assert_same(continued, expected)

    def test_second_turn_after_a_stop_at_a_visual_token(self, golden_model):
        """The cache has not read that token, and its id alone does not say what it was."""
        prompt, cache = {"input_ids": torch.tensor([[208, 92, IMAGE_START]])}, DynamicCache()
        first = generate(golden_model, prompt, cache=cache, stopping_criteria=[StopAfter(3 + N)])
        assert len(first.visual_tokens[0]) == 1
        for more in ([], [IMAGE_END, 92]):
            question = torch.cat([first.sequences, torch.tensor([more], dtype=torch.long)], dim=1)
            with pytest.raises(ValueError, match="has 1 image token positions, but the images fill 0"):
                generate(golden_model, {"input_ids": question}, cache=copy.deepcopy(cache))


class TestLimits:
    """Answers end at their limits, and images begin only where they fit."""

    @pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "sequence_bias": [[[IMAGE_START], 5.0]]}])
    def test_rows_without_an_end(self, golden, batch, kwargs):
        """Without an end-of-text token, and without a padding token, all rows stop at `max_new_tokens`."""
        model = golden.build_model()
        model.generation_config = GenerationConfig()
        torch.manual_seed(0)
        length = batch["input_ids"].shape[1]
        for limit in (2, 5, N + 2, 40):
            outputs = generate(model, batch, max_new_tokens=limit, **kwargs)
            assert outputs.sequences.shape[1] == length + limit and not outputs.unfinished_images.any()

    @pytest.mark.parametrize("max_new_tokens", [1, N + 1, N + 2])
    def test_no_room_for_any_image(self, golden_model, prompt, max_new_tokens, caplog):
        inputs = prompt("one_image")
        generate(golden_model, inputs, max_new_tokens=max_new_tokens)
        warning = (
            f"takes {N + 2} more tokens, but only {max_new_tokens} fit after the prompt, so the answer will be text"
        )
        assert caplog.text.count(warning) == (max_new_tokens < N + 2)
        caplog.clear()
        generate(golden_model, inputs, max_new_tokens=max_new_tokens, max_images=0)
        assert not caplog.text
        if max_new_tokens < N + 2:
            with pytest.raises(ValueError, match=f"takes {N + 2} more tokens.*pass max_new_tokens={N + 2} or more"):
                generate(golden_model, inputs, max_new_tokens=max_new_tokens, force_image=True)

    @pytest.mark.parametrize("force_image", [True, False])
    def test_room_for_an_image_that_the_prompt_begins(self, golden_model, force_image):
        inputs = {"input_ids": torch.tensor([[208, 92, IMAGE_START]])}
        outputs = generate(golden_model, inputs, force_image=force_image, max_new_tokens=N + 1)
        assert outputs.sequences[0, 3:].tolist() == [IMAGE] * N + [IMAGE_END]
        with pytest.raises(ValueError, match=f"takes {N + 1} more tokens, but only {N} fit"):
            generate(golden_model, inputs, force_image=force_image, max_new_tokens=N)

    @pytest.mark.parametrize("where", ["context", "context, embeddings", "static cache"])
    @pytest.mark.parametrize("fits", [True, False])
    def test_image_begins_only_where_it_fits(self, tiny_config, tiny_model, where, fits):
        """An image takes 6 tokens, the last of which is not read; there are 16 positions."""
        config = GPT2Config(
            vocab_size=tiny_config().text_config.vocab_size,
            n_positions=16 if "context" in where else 100,
            n_embd=32,
            n_layer=1,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = tiny_model(text_config=config)
        start, end = model.config.image_start_token_id, model.config.image_end_token_id
        ids = torch.full((1, 11 if fits else 12), 40)
        inputs = {"input_ids": ids}
        if "embeddings" in where:
            inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
        kwargs = {"max_new_tokens": 6, "do_sample": False}
        if not fits:  # text ends before the positions do
            kwargs["stopping_criteria"] = [StopAfter(4 if "embeddings" in where else 16)]
        if where == "static cache":
            kwargs["cache"] = StaticCache(config=config, max_cache_len=16)
        bias = [[[start], 1e4]]  # it prefers images
        outputs = model.generate(**inputs, **kwargs, sequence_bias=bias, return_dict_in_generate=True)
        assert (end in outputs.sequences[0]) is fits and len(outputs.visual_tokens[0]) == fits
        if where == "static cache":
            kwargs["cache"].reset()
        if fits:
            assert end in model.generate(**inputs, **kwargs, force_image=True)[0]
        else:
            with pytest.raises(ValueError, match="but only 5 fit after the prompt: shorten the prompt by 1 tokens"):
                model.generate(**inputs, **kwargs, force_image=True)

    def test_stop_that_is_seen_a_step_late(self, golden_model, prompt, batch, monkeypatch):
        """Simulate MPS, where the loop does not wait for the device."""
        expected = [generate(golden_model, inputs, max_new_tokens=24) for inputs in (prompt("one_image"), batch)]

        class Event:
            def __init__(self, **kwargs):
                pass

            def record(self):
                pass

            def synchronize(self):
                pass

        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))
        for inputs, outputs in zip((prompt("one_image"), batch), expected):
            assert_same(generate(golden_model, inputs, max_new_tokens=24), outputs)


class Script(LogitsProcessor):
    """Forces the given ids, one per step, whatever the model predicts."""

    def __init__(self, prompt_length, *ids):
        self.prompt_length, self.ids = prompt_length, ids

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        if step < len(self.ids):
            scores = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.ids[step]]), 0.0)
        return scores


class StopAfter(StoppingCriteria):
    def __init__(self, length, row=None):
        self.length, self.row = length, row

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        return done if self.row is None else done & (torch.arange(len(input_ids)) == self.row)


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


class IdsAsText:
    """A tokenizer whose words are ids."""

    def decode(self, ids, **kwargs):
        return "".join(f"{id} " for id in ids)


NEEDS_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="transformers wants torchvision")


@pytest.mark.parametrize("task", ["image-text-to-text", pytest.param("any-to-any", marks=NEEDS_TORCHVISION)])
@pytest.mark.parametrize("max_images", [0, 1])
def test_transformers_pipeline(tiny_model, tiny_processor, tiny_images, tmp_path, task, max_images):
    """transformers' pipelines return the text that `generate()` writes."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    content = [{"type": "image", "image": tiny_images[0]}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 8, "do_sample": False, "max_images": max_images, "force_image": max_images > 0}
    answer = pipeline(task, model=str(tmp_path))(text=messages, return_full_text=False, generate_kwargs=options)
    inputs = tiny_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert (model.config.image_token_id in ids) == (max_images > 0)
    assert answer[0]["generated_text"] == tiny_processor.tokenizer.decode(ids, skip_special_tokens=True)


class TestGenerateFeatures:
    """Features of `generate()` work, or an error says why not."""

    def test_sampling(self, golden_model, batch):
        torch.manual_seed(0)
        kwargs = {"do_sample": True, "temperature": 3.0, "top_k": 100, "top_p": 0.95, "max_new_tokens": 60}
        outputs = generate(golden_model, batch, **kwargs)
        torch.manual_seed(0)
        assert_same(outputs, generate(golden_model, batch, **kwargs))
        for row, tokens in zip(answers(outputs, batch), outputs.visual_tokens):
            assert row.count(IMAGE_START) == row.count(IMAGE_END) == row.count(IMAGE) / N == len(tokens)
            text = "".join({IMAGE_START: "s", IMAGE: "i", IMAGE_END: "e"}.get(token, "t") for token in row)
            assert text.replace("s" + "i" * N + "e", "").strip("t") == ""
        torch.manual_seed(1)
        assert generate(golden_model, batch, **kwargs).sequences.tolist() != outputs.sequences.tolist()

    def test_num_return_sequences(self, golden_model, prompt):
        """The prompts have 0, 1 and 2 images, and each is answered with an image first."""
        prompts = [prompt("one_image"), prompt("text_after_image_prompt"), prompt("two_images")]
        second = prompt("image_prompt_image_answer")
        prompts[2] = {key: torch.cat([prompts[2][key], second[key]], dim=int(key == "input_ids")) for key in second}
        for inputs in prompts:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE_START]])], dim=1)
        kwargs = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 30}
        torch.manual_seed(0)
        outputs = generate(golden_model, join(prompts), num_return_sequences=3, **kwargs)
        torch.manual_seed(0)
        repeated = generate(golden_model, join([inputs for inputs in prompts for _ in range(3)]), **kwargs)
        assert_same(outputs, repeated)
        rows = outputs.sequences.tolist()
        assert len(rows) == 9 and rows[0] != rows[1]
        assert all(len(tokens) >= 1 for tokens in outputs.visual_tokens)

    def test_ids_alone(self, golden_model, batch):
        ids = golden_model.generate(**batch, do_sample=False, max_new_tokens=80)
        assert torch.equal(ids, generate(golden_model, batch).sequences)

    def test_all_outputs(self, golden_model, prompt):
        outputs = generate(
            golden_model,
            prompt("one_image"),
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
        )
        steps = outputs.sequences.shape[1] - prompt("one_image")["input_ids"].shape[1]
        assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == steps
        assert outputs.cache is not None

    def test_streamer(self, golden_model, prompt):
        streamer = Collector()
        outputs = generate(golden_model, prompt("two_images"), streamer=streamer)
        assert streamer.ids == outputs.sequences[0].tolist() and streamer.ended

    @pytest.mark.parametrize("case", GREEDY)
    def test_our_streamer(self, golden_model, prompt, case):
        """Text and finished images arrive in reading order and make up the answer."""
        processor = SimpleNamespace(tokenizer=IdsAsText(), image_token_id=IMAGE, num_image_tokens=N)
        streamer = MetaMorphStreamer(processor)
        inputs = prompt(case)
        for _ in range(2):  # one streamer serves one answer after another
            outputs = generate(golden_model, inputs, streamer=streamer)
            (ids,) = answers(outputs, inputs)
            pieces = [piece for piece in streamer if not isinstance(piece, str) or piece]
            images = [piece for piece in pieces if not isinstance(piece, str)]
            assert len(images) == len(outputs.visual_tokens[0])
            for image, expected in zip(images, outputs.visual_tokens[0]):
                assert torch.equal(image, expected)
            text = "".join(piece if isinstance(piece, str) else f"{IMAGE} " * N for piece in pieces)
            assert text.split() == [str(token) for token in ids]

    def test_a_reader_learns_that_generation_failed(self, tiny_model, tiny_processor):
        """It does not wait forever for the next piece."""
        streamer = MetaMorphStreamer(tiny_processor, timeout=60)
        inputs = tiny_processor.tokenizer("Hello there", return_tensors="pt")

        def generate():
            with pytest.raises(ValueError, match="takes 6 more tokens"):
                tiny_model().generate(**inputs, max_new_tokens=3, force_image=True, streamer=streamer)

        thread = Thread(target=generate)
        thread.start()
        with pytest.raises(ValueError, match="takes 6 more tokens"):
            list(streamer)
        thread.join()

    def test_a_reader_learns_that_arguments_are_refused(self, golden_model, prompt):
        processor = SimpleNamespace(tokenizer=IdsAsText(), image_token_id=IMAGE, num_image_tokens=N)
        streamer, inputs = MetaMorphStreamer(processor, timeout=60), prompt("two_images")
        with pytest.raises(ValueError, match="image token positions"):
            generate(golden_model, {"input_ids": inputs["input_ids"]}, streamer=streamer)
        with pytest.raises(ValueError, match="image token positions"):
            next(streamer)

    def test_a_streamer_serves_again_after_a_failure(self, golden_model, prompt):
        """Neither the rest of the failed answer nor the next prompt is part of the next answer."""
        processor = SimpleNamespace(tokenizer=IdsAsText(), image_token_id=IMAGE, num_image_tokens=N)
        streamer, inputs = MetaMorphStreamer(processor, timeout=60), prompt("text_after_image_prompt")

        def fail(ids, scores, **kwargs):
            if ids.shape[1] > inputs["input_ids"].shape[1] + 2:
                raise RuntimeError("stopped")
            return torch.zeros(len(ids), dtype=torch.bool)

        with pytest.raises(RuntimeError, match="stopped"):
            generate(golden_model, inputs, streamer=streamer, stopping_criteria=[fail])
        with pytest.raises(RuntimeError, match="stopped"):
            list(streamer)
        outputs = generate(golden_model, inputs, streamer=streamer, max_images=0, max_new_tokens=5)
        assert "".join(streamer).split() == [str(token) for token in answers(outputs, inputs)[0]]

    def test_streamed_text_comes_as_it_is_written(self, tiny_model, tiny_processor):
        """It comes before the answer is finished, in the pieces that transformers' own streamer makes."""
        model = tiny_model()
        inputs = tiny_processor.tokenizer("Hello there", return_tensors="pt")
        written = Script(inputs.input_ids.shape[1], *tiny_processor.tokenizer("one two three ").input_ids)
        theirs = TextIteratorStreamer(tiny_processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        pieces = []
        for streamer in (MetaMorphStreamer(tiny_processor, timeout=60), theirs):
            kwargs = {"max_new_tokens": 14, "logits_processor": [written], "streamer": streamer, "do_sample": False}
            thread = Thread(target=model.generate, kwargs={**inputs, **kwargs})
            thread.start()
            pieces.append(list(streamer))
            thread.join()
        assert pieces[0] == pieces[1] and "".join(pieces[0]) == "one two three " and len(pieces[0]) > 3

    @pytest.mark.parametrize("max_images, expected", [(0, [0, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [0, 1, 1, 2])])
    def test_max_images(self, golden_model, batch, max_images, expected):
        outputs = generate(golden_model, batch, max_images=max_images)
        assert [len(tokens) for tokens in outputs.visual_tokens] == expected
        free = generate(golden_model, batch)
        for row, (found, wanted) in enumerate(zip(answers(outputs, batch), answers(free, batch))):
            until = found.index(IMAGE_END) + 1 if IMAGE_END in found else 0
            assert found[:until] == wanted[:until]
            if len(outputs.visual_tokens[row]) == len(free.visual_tokens[row]):
                assert found == wanted

    def test_images_count_that_the_prompt_begins(self, golden_model):
        prompt = {"input_ids": torch.tensor([[208, 92, IMAGE_START]])}
        outputs = generate(golden_model, prompt, max_images=1, max_new_tokens=40)
        assert len(outputs.visual_tokens[0]) == 1 and IMAGE_START not in outputs.sequences[0, 3:]

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_force_image(self, golden_model, batch, use_cache):
        """It equals a prompt that ends with `<image_start>`, except that the answer holds that token."""
        outputs = generate(golden_model, batch, force_image=True, max_images=1, use_cache=use_cache)
        begun = torch.full((4, 1), IMAGE_START)
        asked = {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], begun], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(begun)], dim=1),
        }
        expected = generate(golden_model, asked, max_images=1, max_new_tokens=79)
        assert_same(outputs, expected)

    def test_options_in_the_generation_config(self, golden, prompt, tmp_path):
        model = golden.build_model()
        model.generation_config = GenerationConfig(eos_token_id=list(EOS), pad_token_id=PAD, max_images=1)
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
        assert len(generate(model, prompt("two_images")).visual_tokens[0]) == 1
        assert len(generate(model, prompt("two_images"), max_images=2).visual_tokens[0]) == 2

    @pytest.mark.parametrize("stored, given", [({"force_image": True}, {"max_images": 0}), ({"max_images": 0}, {})])
    def test_a_call_goes_before_what_is_stored(self, golden, prompt, stored, given):
        model = golden.build_model()
        model.generation_config = GenerationConfig(eos_token_id=list(EOS), pad_token_id=PAD, **stored)
        outputs = generate(model, prompt("one_image"), **given, max_new_tokens=N + 2)
        assert len(outputs.visual_tokens[0]) == 0
        outputs = generate(model, prompt("one_image"), force_image=True, max_new_tokens=N + 2)
        assert len(outputs.visual_tokens[0]) == 1

    def test_a_stored_image_is_forced_whatever_config_is_passed(self, golden, prompt):
        model = golden.build_model()
        model.generation_config.force_image = True
        for config in (None, GenerationConfig(), MetaMorphGenerationConfig()):
            outputs = generate(
                model, prompt("text_after_image_prompt"), generation_config=config, max_new_tokens=N + 2
            )
            assert outputs.sequences[0, -N - 2] == IMAGE_START

    @pytest.mark.parametrize(
        "name, value", [("max_time", math.nan), ("use_cache", "no"), ("num_return_sequences", True)]
    )
    def test_options_beside_a_generation_config(self, golden_model, prompt, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is "):
            generate(golden_model, prompt("one_image"), generation_config=GenerationConfig(), **{name: value})

    @pytest.mark.parametrize(
        "kwargs, sentence",
        [
            ({"max_images": -1}, "is -1, but must be 0"),
            ({"max_images": "two"}, "is 'two', but must be an integer"),
            ({"max_images": 0, "force_image": True}, "asks for an image, but `max_images=0`"),
            ({"suppress_tokens": [IMAGE_START], "force_image": True}, "asks for an image, but .*`suppress_tokens`"),
        ],
    )
    def test_options_that_make_no_sense(self, golden_model, prompt, kwargs, sentence):
        with pytest.raises(ValueError, match=sentence):
            generate(golden_model, prompt("one_image"), **kwargs)

    def test_logits_processor(self, golden_model, prompt):
        """A processor decides about text, but not inside an image."""
        inputs = prompt("text_after_image_prompt")
        length = inputs["input_ids"].shape[1]
        script = Script(length, 92, IMAGE_START, *[93] * (N + 1), 94, IMAGE_START)
        outputs = generate(golden_model, inputs, logits_processor=[script], max_new_tokens=2 * N + 6)
        image_ids = [IMAGE_START, *[IMAGE] * N, IMAGE_END]
        assert answers(outputs, inputs) == [[92, *image_ids, 94, *image_ids]]
        assert outputs.visual_tokens[0].shape == (2, N, 32)

    @pytest.mark.parametrize("warper", [{"top_k": 1}, {"top_p": 0.01, "top_k": 0}, {"min_p": 0.99, "top_k": 0}])
    @pytest.mark.parametrize("limit", [{"max_new_tokens": 3}, {"max_new_tokens": N + 6, "max_images": 1}])
    def test_sampling_where_the_likeliest_image_is_forbidden(self, golden_model, prompt, warper, limit):
        """`<image_start>` is forbidden before `top_k` and its like, which would leave nothing else."""
        inputs, options = prompt("one_image"), {**limit, **warper, "sequence_bias": [[[IMAGE_START], 100.0]]}
        outputs = generate(golden_model, inputs, do_sample=True, min_new_tokens=3, output_scores=True, **options)
        (ids,) = answers(outputs, inputs)
        assert ids.count(IMAGE_START) == limit.get("max_images", 0)
        assert all(scores.isfinite().any() for scores in outputs.scores)

    def test_text_settings_do_not_disturb_images(self, golden_model, prompt):
        inputs = prompt("one_image")
        kwargs = {
            "repetition_penalty": 5.0,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[IMAGE]],
            "min_new_tokens": 22,
        }
        (ids,) = answers(generate(golden_model, inputs, max_new_tokens=22, **kwargs), inputs)
        assert ids[4 : 5 + N] == [IMAGE] * N + [IMAGE_END]

    def test_image_ids_are_never_chosen_as_text(self, golden, prompt):
        model = golden.build_model()
        row = model.lm_head.weight.data[150].clone()  # the first id of the answer
        model.lm_head.weight.data[[IMAGE, IMAGE_END]] = 5 * row
        inputs = prompt("one_image")
        (ids,) = answers(generate(model, inputs, max_new_tokens=1), inputs)
        assert ids == [150]

    @pytest.mark.parametrize("inside", [0, 1, N - 1])
    def test_criterion_stops_inside_an_image(self, golden_model, prompt, inside, caplog):
        inputs = prompt("one_image")
        length = inputs["input_ids"].shape[1] + 4 + inside
        outputs = generate(golden_model, inputs, stopping_criteria=[StopAfter(length)])
        assert outputs.sequences.shape[1] == length
        assert outputs.visual_tokens[0].shape == (0, N, 32)
        assert outputs.unfinished_images.tolist() == [True]
        assert "rows [0] inside an image" in caplog.text

    def test_criterion_stops_one_row(self, golden_model, batch, caplog):
        length = batch["input_ids"].shape[1] + 10
        outputs = generate(golden_model, batch, stopping_criteria=[StopAfter(length, row=2)])
        assert outputs.unfinished_images.tolist() == [False, False, True, False]
        assert [len(tokens) for tokens in outputs.visual_tokens] == [0, 1, 0, 2]
        expected = generate(golden_model, batch)
        for row in (1, 3):
            torch.testing.assert_close(outputs.visual_tokens[row], expected.visual_tokens[row], rtol=0, atol=1e-5)
        assert "rows [2] inside an image" in caplog.text

    def test_criterion_after_an_image(self, golden_model, prompt, caplog):
        inputs = prompt("one_image")
        for length in (4 + N, 4 + N + 1):  # before and after <image_end>
            criterion = StopAfter(inputs["input_ids"].shape[1] + length)
            outputs = generate(golden_model, inputs, stopping_criteria=[criterion])
            assert outputs.visual_tokens[0].shape == (1, N, 32)
            assert not outputs.unfinished_images.any() and not caplog.text

    def test_a_loop_of_the_caller_cannot_generate_images(self, golden_model, prompt):
        loop = {"custom_generate": GenerationMixin._sample, "max_new_tokens": 3}
        with pytest.raises(ValueError, match="custom_generate cannot generate images.*max_images=0"):
            generate(golden_model, prompt("one_image"), **loop)
        text = generate(golden_model, prompt("one_image"), max_images=0, max_new_tokens=3)
        for off in ({"max_images": 0}, {"generation_config": MetaMorphGenerationConfig(max_images=0)}):
            assert torch.equal(generate(golden_model, prompt("one_image"), **off, **loop).sequences, text.sequences)

    @pytest.mark.parametrize(
        "kwargs", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}]
    )
    def test_modes_that_cannot_generate_images(self, golden_model, prompt, kwargs):
        with pytest.raises(ValueError, match=r"cannot generate images.*max_images=0"):
            generate(golden_model, prompt("one_image"), **kwargs)

    def test_guidance_cannot_generate_images(self, golden_model, prompt):
        with pytest.raises(ValueError, match=r"guidance_scale cannot generate images.*max_images=0"):
            generate(golden_model, prompt("one_image"), guidance_scale=1.5)

    def test_guidance_of_text(self, golden_model, prompt):
        inputs = prompt("image_prompt_image_answer")
        outputs = generate(
            golden_model, inputs, guidance_scale=1.5, max_images=0, max_new_tokens=2, output_scores=True
        )
        with torch.no_grad():
            guided = golden_model(**inputs).logits[0, -1].log_softmax(-1)
            plain = golden_model(input_ids=inputs["input_ids"][:, -1:]).logits[0, -1].log_softmax(-1)
        shift = outputs.scores[0][0, :IMAGE_START] - (plain + 1.5 * (guided - plain))[:IMAGE_START]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("how", ["generate_batch", "paged"])
    def test_continuous_batching(self, golden_model, prompt, how):
        inputs = prompt("one_image")
        with pytest.raises(NotImplementedError, match="Continuous batching .* no visual tokens"):
            if how == "generate_batch":
                golden_model.generate_batch(inputs["input_ids"].tolist())
            else:
                golden_model.generate(**inputs, cache_implementation="paged")

    def test_image_out_of_the_any_to_any_pipeline(self, golden_model, prompt):
        """The pipeline itself needs torchvision; this is what it passes on."""
        generate(golden_model, prompt("one_image"), max_new_tokens=1, generation_mode="text")
        with pytest.raises(ValueError, match="'image' is not supported: use MetaMorphPipeline"):
            generate(golden_model, prompt("one_image"), generation_mode="image")

    def test_assistant_cannot_generate_images(self, golden_model, prompt):
        with pytest.raises(ValueError, match="assisted generation cannot generate images"):
            generate(golden_model, prompt("one_image"), assistant_model=copy.deepcopy(golden_model))

    @pytest.mark.parametrize(
        "off", [{"suppress_tokens": [IMAGE_START]}, {"bad_words_ids": [[150, 151], [IMAGE_START]]}, {"max_images": 0}]
    )
    def test_beams_without_images(self, golden_model, batch, off):
        kwargs = {**off, "max_new_tokens": 6}
        outputs = generate(golden_model, batch, num_beams=3, **kwargs)
        assert not (outputs.sequences[:, batch["input_ids"].shape[1] :] == IMAGE_START).any()
        greedy = generate(golden_model, batch, **kwargs)
        assert [len(tokens) for tokens in greedy.visual_tokens] == [0] * 4
        drawing = generate(golden_model, batch, max_new_tokens=6)
        assert answers(greedy, batch)[0] == answers(drawing, batch)[0][:6]

    def test_logits_are_those_of_each_position_if_asked_for(self, golden_model, batch):
        """Also inside an image, where the next id is forced."""
        logits = torch.stack(generate(golden_model, batch, output_logits=True).logits)
        uncached = torch.stack(generate(golden_model, batch, output_logits=True, use_cache=False).logits)
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-5 * uncached.abs().max().item())
        assert (logits.std(-1) > 0).all()

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_image_asked_for_and_switched_off(self, golden_model, num_beams):
        """`suppress_tokens` wins, also in beam search, which cannot generate images."""
        outputs = generate(
            golden_model,
            {"input_ids": torch.tensor([[208, 92, IMAGE_START]])},
            suppress_tokens=[IMAGE_START],
            num_beams=num_beams,
            max_new_tokens=5,
        )
        assert not (outputs.sequences[0, 3:] >= IMAGE_START).any()
        if num_beams == 1:
            assert len(outputs.visual_tokens[0]) == 0 and not outputs.unfinished_images.any()

    def test_compiled_step_is_one_graph(self, golden, batch):
        model = golden.build_model()
        compile_config = CompileConfig(fullgraph=True, backend="eager")
        compile_config._compile_all_devices = True
        outputs = generate(model, batch, cache_implementation="static", compile_config=compile_config)
        assert hasattr(model, "_compiled_call")
        assert_same(outputs, generate(golden.build_model(), batch))
