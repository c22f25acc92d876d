"""`visual_decoding="parallel"`: one forward pass per image, against a query per step and a plain loop."""

import sys
from types import SimpleNamespace

import enable_parallel_decoding
import pytest
import torch
from common import ConversionError
from helpers import PLACEHOLDER
from transformers import AutoModel, CompileConfig, DynamicCache, LogitsProcessor, StoppingCriteria

from metamorph_hf import MetaMorphStreamer


N = 16
IMAGE, IMAGE_START, IMAGE_END = PLACEHOLDER, 222, 223
EOS, PAD = (209, 217), 209


@pytest.fixture(scope="module")
def model(golden):
    """The golden language model with random queries."""
    torch.manual_seed(0)
    model = golden.build_model(visual_decoding="parallel")
    torch.nn.init.normal_(model.model.visual_queries.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def batch(golden, golden_image_processor):
    """Three prompts of two lengths, padded on the left; the second one holds an image."""
    pixels = golden_image_processor([golden.images["shapes"]], return_tensors="pt").pixel_values
    rows = [[208, 92, 151, 25], [208, 40, IMAGE_START, *[IMAGE] * N, IMAGE_END, 92, 25], [208, 12, 31, 99, 8]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels,
    }


class Script(LogitsProcessor):
    """Forces the ids of a script wherever it names one: `scripts[row][step]`; None leaves the choice to the model."""

    def __init__(self, prompt_length, *scripts):
        self.prompt_length, self.scripts = prompt_length, scripts

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        for row, script in enumerate(self.scripts):
            if step < len(script) and script[step] is not None:
                scores[row] = torch.full_like(scores[row], -torch.inf).index_fill(0, torch.tensor(script[step]), 0.0)
        return scores


class StopRow(StoppingCriteria):
    """Finishes one row, or all of them, at a length."""

    def __init__(self, length, row=None):
        self.length, self.row = length, row

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        return done if self.row is None else done & (torch.arange(len(input_ids)) == self.row)


def generate(model, inputs, passes=True, **kwargs):
    """Generate with one pass per image, or with a query per step."""
    defaults = {"do_sample": False, "max_new_tokens": 60, "return_dict_in_generate": True, "output_logits": True}
    allows_passes = type(model)._allows_passes
    if not passes:
        model._allows_passes = lambda *args, **kwargs: False
    try:
        return model.generate(**inputs, **{**defaults, **kwargs})
    finally:
        model.__dict__.pop("_allows_passes", None)
        assert type(model)._allows_passes is allows_passes


def assert_same(outputs, expected):
    assert outputs.sequences.tolist() == expected.sequences.tolist()
    for tokens, expected_tokens in zip(outputs.visual_tokens, expected.visual_tokens, strict=True):
        torch.testing.assert_close(tokens, expected_tokens, rtol=0, atol=1e-5)
    logits, expected_logits = torch.stack(outputs.logits), torch.stack(expected.logits)
    unfinished = outputs.sequences[:, -len(logits) :].T != PAD
    scale = expected_logits.abs().max()
    assert (logits - expected_logits)[unfinished].abs().max() < 1e-5 * scale


def count_passes(model, call):
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    outputs = call()
    hook.remove()
    return outputs, lengths


@torch.no_grad()
def plain_loop(model, ids, pixel_values, script, max_new_tokens):
    """Decode one prompt without a cache: inside an image position i reads query i, and all is read again each step."""
    base = model.model
    embeds = base.language_model.embed_tokens(ids)
    if (ids == IMAGE).any():
        embeds[ids == IMAGE] = base.projector(base.get_visual_tokens(pixel_values)).flatten(0, 1)
    new, visual_tokens, index = [], [], None
    while len(new) < max_new_tokens:
        hidden = base.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        if index is not None and index < N:
            visual_tokens.append(torch.nn.functional.normalize(model.vision_head(hidden), dim=-1))
            token, embed = IMAGE, base.visual_queries.weight[None, index]
            index += 1
        else:
            logits = model.lm_head(hidden)[0]
            logits[[IMAGE, IMAGE_END]] = -torch.inf
            if len(new) + N + 2 > max_new_tokens:
                logits[IMAGE_START] = -torch.inf
            token = logits.argmax().item()
            if len(new) < len(script) and script[len(new)] is not None:
                token = script[len(new)]
            if index == N:
                token, index = IMAGE_END, None
            embed = base.language_model.embed_tokens(torch.tensor([token]))
            index = 0 if token == IMAGE_START else index
        new.append(token)
        if token in EOS:
            break
        embeds = torch.cat([embeds, embed[None]], dim=1)
    return new, torch.stack(visual_tokens).view(-1, N, 32) if visual_tokens else torch.zeros(0, N, 32)


TOGETHER = [[92, IMAGE_START]] * 3
TWICE = [[92, IMAGE_START, *[None] * (N + 1), 14, IMAGE_START]] * 3
MIXED = [[92, IMAGE_START], [14, 15, 16, IMAGE_START], [14, 209]]
ONE_ENDS_FIRST = [[92, 93, IMAGE_START], [92, 93, IMAGE_START], [14, 209]]


def test_a_row_that_writes_the_pad_token_has_not_finished(model, batch):
    """Its text stands beside the others' images, so that these take a query per step."""
    scripts, pad = [[92, IMAGE_START], [14, 5, 15, 16, 17], [92, IMAGE_START]], 5
    options = {"pad_token_id": pad, "logits_processor": [Script(batch["input_ids"].shape[1], *scripts)]}
    outputs, expected = (generate(model, batch, passes, **options) for passes in (True, False))
    assert outputs.sequences.tolist() == expected.sequences.tolist()
    assert outputs.sequences[1, batch["input_ids"].shape[1] :][:5].tolist() == scripts[1]
    for tokens, expected_tokens in zip(outputs.visual_tokens, expected.visual_tokens, strict=True):
        torch.testing.assert_close(tokens, expected_tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scripts", [TOGETHER, TWICE, MIXED, ONE_ENDS_FIRST])
@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_against_a_plain_loop(model, batch, scripts, kwargs):
    length = batch["input_ids"].shape[1]
    script = Script(length, *scripts)
    outputs = generate(model, batch, logits_processor=[script], **kwargs)
    assert_same(outputs, generate(model, batch, passes=False, logits_processor=[script], **kwargs))
    for row, one_script in enumerate(scripts):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        expected, visual_tokens = plain_loop(model, ids[None], batch["pixel_values"], one_script, 60)
        new = outputs.sequences[row, length:].tolist()
        assert new[: len(expected)] == expected and set(new[len(expected) :]) <= {PAD}
        torch.testing.assert_close(outputs.visual_tokens[row], visual_tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["script", "force_image", "prompt"])
def test_an_image_is_one_pass(model, batch, how):
    """The prompt, text steps of one token, and one pass for the whole image."""
    prompt = {"input_ids": batch["input_ids"][:1, -4:]}
    kwargs = {"max_new_tokens": N + 2, "min_new_tokens": N + 2}
    if how == "script":
        kwargs["logits_processor"] = [Script(4, [IMAGE_START])]
    elif how == "force_image":
        kwargs["force_image"] = True
    else:
        prompt = {"input_ids": torch.tensor([[208, 92, 151, IMAGE_START]])}
        kwargs = {"max_new_tokens": N + 1}
    outputs, lengths = count_passes(model, lambda: generate(model, prompt, **kwargs))
    assert len(outputs.visual_tokens[0]) == 1
    assert lengths == ([4, N] if how == "prompt" else [4, N + 1])
    assert_same(outputs, generate(model, prompt, passes=False, **kwargs))


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_text(model, batch, seed):
    """The random numbers of the text do not depend on how images are generated."""
    kwargs = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2, "max_new_tokens": 50}
    kwargs["logits_processor"] = [Script(batch["input_ids"].shape[1], *[[None, IMAGE_START]] * 6)]
    found = []
    for passes in (True, False):
        torch.manual_seed(seed)
        found.append(generate(model, batch, passes, **kwargs))
    assert_same(*found)
    assert all(len(tokens) >= 1 for tokens in found[0].visual_tokens)


def test_processors_of_the_caller_read_real_logits(model, batch):
    """Also at steps whose next id is forced, and however the image is generated."""

    class Reader(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append(scores.clone())
            return scores

    seen = []
    for passes in (True, False):
        reader = Reader()
        options = {"force_image": True, "max_new_tokens": N + 2, "min_new_tokens": N + 2}
        generate(model, batch, passes, logits_processor=[reader], **options)
        seen.append(torch.stack(reader.seen))
    assert len(seen[0]) == N + 2 and (seen[0].amax(-1) > seen[0].amin(-1).clamp(min=-1e4)).all()
    finite = seen[1].isfinite()
    torch.testing.assert_close(seen[0][finite], seen[1][finite], rtol=0, atol=1e-4)


def test_hidden_states_are_those_of_each_step(model, batch):
    kwargs = {"output_hidden_states": True, "logits_processor": [Script(batch["input_ids"].shape[1], *TOGETHER)]}
    outputs, expected = (generate(model, batch, passes, **kwargs) for passes in (True, False))
    assert_same(outputs, expected)
    assert len(outputs.hidden_states) == len(expected.hidden_states)
    assert outputs.hidden_states[5][-1].shape == (3, 1, 48)


def test_streamer(model):
    """The image arrives whole, between the pieces of text."""
    ids = SimpleNamespace(decode=lambda ids, **kwargs: "".join(f"{id} " for id in ids))
    streamer = MetaMorphStreamer(SimpleNamespace(tokenizer=ids, image_token_id=IMAGE, num_image_tokens=N))
    prompt = {"input_ids": torch.tensor([[208, 92, 151]])}
    script = Script(3, [92, IMAGE_START, *[None] * (N + 1), 93, 209])
    outputs = generate(model, prompt, logits_processor=[script], streamer=streamer)
    pieces = [piece for piece in streamer if not isinstance(piece, str) or piece]
    (image,) = [piece for piece in pieces if not isinstance(piece, str)]
    assert torch.equal(image, outputs.visual_tokens[0][0])
    text = "".join(piece if isinstance(piece, str) else "image " for piece in pieces)
    assert text.split() == ["92", str(IMAGE_START), "image", str(IMAGE_END), "93", "209"]


@pytest.mark.parametrize("row", [None, 1])
@pytest.mark.parametrize("inside", [0, 1, 7, N])
def test_criterion_inside_an_image(model, batch, row, inside):
    length = batch["input_ids"].shape[1] + 2 + inside
    kwargs = {
        "logits_processor": [Script(batch["input_ids"].shape[1], *TOGETHER)],
        "stopping_criteria": [StopRow(length, row)],
    }
    outputs, expected = (generate(model, batch, passes, **kwargs) for passes in (True, False))
    assert_same(outputs, expected)
    assert outputs.unfinished_images.tolist() == expected.unfinished_images.tolist()
    # The next turn goes on from the cache as if nothing had been read ahead.
    assert outputs.cache.get_seq_length() == expected.cache.get_seq_length()
    cache = DynamicCache()
    generate(model, batch, True, **kwargs, cache=cache, return_dict_in_generate=False)
    assert cache.get_seq_length() == expected.cache.get_seq_length()


def test_second_turn_reads_queries(model):
    """Continued through the cache, a generated image stays what it was when it was generated."""
    prompt, cache = {"input_ids": torch.tensor([[208, 92, 151]])}, DynamicCache()
    script = Script(3, [IMAGE_START, *[None] * (N + 1), 209])
    first = generate(model, prompt, cache=cache, logits_processor=[script])
    question = torch.cat([first.sequences, torch.tensor([[92, 151]])], dim=1)
    outputs = generate(model, {"input_ids": question}, cache=cache, max_images=0, max_new_tokens=1)
    embeds = model.get_input_embeddings()(question)
    embeds[question == IMAGE] = model.model.visual_queries.weight
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        expected = model.lm_head(hidden)
    torch.testing.assert_close(outputs.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_a_cache_without_its_use_is_refused(model):
    """transformers would read the whole conversation into the cache again at each step."""
    with pytest.raises(ValueError, match="`use_cache` is False"):
        generate(model, {"input_ids": torch.tensor([[208, 92, 151]])}, cache=DynamicCache(), use_cache=False)


@pytest.mark.parametrize("passes", [True, False])
def test_steps_are_compiled_once_and_passes_never(golden, batch, passes):
    torch.manual_seed(0)
    model = golden.build_model(visual_decoding="parallel")
    compile_config = CompileConfig(fullgraph=True, backend="eager")
    compile_config._compile_all_devices = True
    kwargs = {"logits_processor": [Script(batch["input_ids"].shape[1], *TOGETHER)]}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outputs = generate(model, batch, passes, cache_implementation="static", compile_config=compile_config, **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same(outputs, generate(model, batch, **kwargs))


class TestTraining:
    @pytest.fixture
    def inputs(self, tiny_config):
        """A question with an image that is answered with an image, and a text."""
        config = tiny_config()
        start, end, image = config.image_start_token_id, config.image_end_token_id, config.image_token_id
        picture = [start, *[image] * 4, end]
        ids = torch.tensor([[40, *picture, 41, 42, *picture, 1]])
        labels = ids.clone()
        labels[:, :9] = -100
        torch.manual_seed(0)
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 16, 16)}

    @torch.no_grad()
    def test_losses_against_a_plain_pass(self, tiny_model, inputs):
        """Context images are read as ever, target images as queries, and position t - 1 predicts position t."""
        model = tiny_model(visual_decoding="parallel").train()
        base = model.model
        targets = model.get_visual_tokens(inputs["pixel_values"])
        embeds = base.language_model.embed_tokens(inputs["input_ids"])
        embeds[:, 2:6], embeds[:, 10:14] = base.projector(targets[0]), base.visual_queries.weight
        hidden = base.language_model(inputs_embeds=embeds).last_hidden_state[0]
        predicted = torch.nn.functional.normalize(model.vision_head(hidden[9:13]), dim=-1)
        outputs = model(**inputs)
        assert outputs.visual_loss.item() == pytest.approx(-(predicted * targets[1]).sum(-1).mean().item(), abs=1e-6)
        assert outputs.visual_cosine.item() == pytest.approx(-outputs.visual_loss.item(), abs=1e-6)

    def test_predictions_do_not_depend_on_the_target(self, tiny_model, inputs):
        model = tiny_model(visual_decoding="parallel", visual_token_noise=2.0).train()
        changed = inputs["pixel_values"].clone()
        changed[1] = 0
        losses = [
            model(**{**inputs, "pixel_values": pixels}).text_loss for pixels in (inputs["pixel_values"], changed)
        ]
        assert losses[0] == losses[1]
        changed[0] = 0
        assert model(**{**inputs, "pixel_values": changed}).text_loss != losses[0]

    @pytest.mark.parametrize("with_target", [True, False])
    def test_queries_always_have_gradients(self, tiny_model, inputs, with_target):
        """Data parallel training waits for every parameter."""
        model = tiny_model(visual_decoding="parallel").train()
        if not with_target:
            inputs["labels"][inputs["labels"] == model.config.image_token_id] = -100
        model(**inputs).loss.backward()
        assert model.model.visual_queries.weight.grad.abs().sum().item() > 0 or not with_target
        assert model.model.visual_queries.weight.grad is not None

    def test_generated_is_what_was_trained(self, tiny_model, inputs):
        """The visual tokens of an answer are the predictions of the training pass."""
        model = tiny_model(visual_decoding="parallel")
        with torch.no_grad():
            embeds = model.model(
                input_ids=inputs["input_ids"],
                pixel_values=inputs["pixel_values"],
                visual_target_mask=(inputs["labels"] == model.config.image_token_id),
            ).last_hidden_state
            expected = torch.nn.functional.normalize(model.vision_head(embeds[0, 9:13]), dim=-1)
        prompt = {"input_ids": inputs["input_ids"][:, :9], "pixel_values": inputs["pixel_values"][:1]}
        outputs = model.generate(
            **prompt, force_image=True, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        torch.testing.assert_close(outputs.visual_tokens[0][0], expected, rtol=0, atol=1e-5)


def test_saved_and_loaded(tiny_model, tmp_path):
    model = tiny_model(visual_decoding="parallel")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.visual_decoding == "parallel"
    assert torch.equal(loaded.model.visual_queries.weight, model.model.visual_queries.weight)
    prompt = {"input_ids": torch.tensor([[40, 41]]), "force_image": True, "max_new_tokens": 6}
    assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))


@torch.no_grad()
def test_autoregressive_model_becomes_parallel(tiny_model, tmp_path):
    """Only the queries are new, which start at the mean of images; text and image understanding stay."""
    model, expected = tiny_model(), tiny_model()
    visual_tokens = model.get_visual_tokens(torch.randn(5, 3, 16, 16))
    model.enable_parallel_decoding(visual_tokens)
    queries = torch.stack([expected.model.projector(tokens) for tokens in visual_tokens]).mean(0)
    torch.testing.assert_close(model.model.visual_queries.weight, queries)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = {"input_ids": torch.tensor([[40, 5, 4, 4, 4, 4, 6, 41]]), "visual_tokens": visual_tokens[:1]}
    assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)
    prompt = {"input_ids": torch.tensor([[40]]), "force_image": True, "max_new_tokens": 6}
    assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))
    with pytest.raises(ValueError, match="parallel.* already: its visual queries would be lost"):
        model.enable_parallel_decoding(visual_tokens)


def test_command(tiny_model, tiny_processor, tiny_images, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    arguments = [str(tmp_path / "model"), str(tmp_path / "parallel"), "--images", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", ["enable_parallel_decoding.py", *arguments])
    with pytest.raises(ConversionError, match="holds no png, jpg or webp images"):
        enable_parallel_decoding.main()
    for index, image in enumerate(tiny_images):
        image.save(tmp_path / "images" / f"{index}.png")
    enable_parallel_decoding.main()
    model = AutoModel.from_pretrained(tmp_path / "parallel")
    pixels = tiny_processor.image_processor(tiny_images, return_tensors="pt").pixel_values
    with torch.no_grad():
        queries = model.model.projector(model.get_visual_tokens(pixels)).mean(0)
    torch.testing.assert_close(model.model.visual_queries.weight, queries)
