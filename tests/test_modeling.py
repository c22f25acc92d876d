import copy
import math

import pytest
import torch
from common import rename_key
from convert_metamorph_to_hf import KEY_TABLE
from helpers import PLACEHOLDER
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    SiglipVisionConfig,
)

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphModel, modeling_metamorph


GOLDEN_IMAGES = ("gradient", "shapes", "gray", "rgba")
RELEASED_PLACEHOLDER = -200
N = 16


def assert_close(actual, expected, tolerance=1e-5):
    """Compare relative to the largest value: logits reach 30, where an absolute 1e-5 would reject correct code."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"off by {error:.1e} of the largest value"


def golden_batch(golden, golden_image_processor, case):
    """Return a batch of the released collator in our form, where `labels` mark targets."""
    tensors, length = golden.tensors, golden.tensors[f"{case}.expanded_labels"].shape[1]
    image_files = list(golden.facts["forward"][case]["image_files"])
    rows, kept = [], []
    for row in tensors[f"{case}.input_ids"].tolist():
        expanded, fits = [], True
        for token in row:
            if token == RELEASED_PLACEHOLDER:
                # The released code drops an image that does not fit and everything after it ("truncated").
                fits = fits and len(expanded) + N <= length
                kept += image_files[:1] if fits else []
                image_files.pop(0)
                token = PLACEHOLDER
            if fits:
                expanded += [token] * (N if token == PLACEHOLDER else 1)
        if RELEASED_PLACEHOLDER not in row:
            image_files.pop(0)  # a text row brings an all-zero image there, whose tokens are dropped
        rows.append((expanded + [209] * length)[:length])
    assert not image_files
    labels = tensors[f"{case}.expanded_labels"].clone()
    labels[tensors[f"{case}.image_positions"] == 1] = PLACEHOLDER
    pixel_values = golden_image_processor([golden.images[name] for name in kept], return_tensors="pt").pixel_values
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": tensors[f"{case}.expanded_attention_mask"].long(),
        "labels": labels,
        "pixel_values": pixel_values,
    }


class TestReleasedVision:
    """Compare with the released implementation's visual path, to 1e-5 of each tensor's largest value."""

    @pytest.fixture(scope="class")
    def pixel_values(self, golden, golden_image_processor):
        images = [golden.images[name] for name in GOLDEN_IMAGES]
        return golden_image_processor(images, return_tensors="pt").pixel_values

    def test_pixels(self, golden, pixel_values):
        assert_close(pixel_values, golden.tensors["vision.pixel_values"])

    @torch.no_grad()
    def test_hidden_state(self, golden, golden_model, pixel_values):
        features = golden_model.get_image_features(pixel_values)
        assert_close(features.hidden_states[-1], golden.tensors["vision.hidden_state_last"])

    @torch.no_grad()
    def test_visual_tokens(self, golden, golden_model, pixel_values):
        assert_close(golden_model.get_visual_tokens(pixel_values), golden.tensors["vision.visual_tokens"])
        features = golden_model.get_image_features(pixel_values)
        assert_close(features.visual_tokens, golden.tensors["vision.visual_tokens"])
        assert_close(features.pooler_output, golden.tensors["vision.projected"])

    @torch.no_grad()
    def test_unnormalized(self, golden, pixel_values):
        model = golden.build_model(normalize_visual_tokens=False)
        assert_close(model.get_visual_tokens(pixel_values), golden.tensors["vision.visual_tokens_unnormalised"])

    @torch.no_grad()
    def test_concat_interpolation(self, golden, golden_model):
        patches = golden.tensors["vision.hidden_state_last"][:1]
        model = copy.deepcopy(golden_model.model)
        model.config.token_reduction = "concat_interpolation"
        visual_tokens = model.normalize_visual_tokens(model.reduce_patches(patches))
        assert_close(visual_tokens, golden.tensors["vision.concat_interpolation"])

    @torch.no_grad()
    def test_not_the_normed_output(self, golden, golden_model, pixel_values):
        """Neither a library upgrade nor a configuration may turn visual tokens into features after the final norm."""
        normed = golden_model.model.vision_tower(pixel_values[:1]).last_hidden_state
        assert_close(normed, golden.tensors["vision.last_hidden_state_unused"])
        model = golden_model.model
        reduced = model.normalize_visual_tokens(model.reduce_patches(normed))
        assert (reduced - golden.tensors["vision.visual_tokens"][:1]).abs().max() > 0.01

    @torch.no_grad()
    def test_tower_configuration_cannot_flip_it(self, golden, golden_model, pixel_values):
        vision_config = copy.deepcopy(golden_model.config.vision_config)
        vision_config.tie_last_hidden_states = True
        model = golden.build_model(vision_config=vision_config)
        assert_close(model.get_visual_tokens(pixel_values), golden.tensors["vision.visual_tokens"])


class TestReleasedForward:
    """Compare losses, logits and gradients on the released implementation's batches."""

    FORWARD = {  # case -> its batch, our configuration
        "mixed": ("mixed", {}),
        "generation": ("generation", {}),
        "truncated": ("truncated", {}),
        "head_mlp2x_gelu": ("generation", {"vision_head_type": "mlp2x_gelu"}),
        "head_other": ("generation", {"vision_head_type": "linear"}),
        "unnormalised": ("generation", {"normalize_visual_tokens": False, "visual_loss_type": "l1"}),
        "vision_coef_0.25": ("generation", {"visual_loss_weight": 0.25}),
        "use_vision_ar_false": ("generation", {"visual_loss_weight": 0.0}),
    }

    def build(self, golden, case, **config):
        model = golden.build_model(**config)
        head = {
            k.removeprefix(f"{case}."): v for k, v in golden.tensors.items() if k.startswith(f"{case}.vision_head")
        }
        model.load_state_dict({rename_key(key, KEY_TABLE): value for key, value in head.items()}, strict=False)
        return model

    @pytest.mark.parametrize("case", FORWARD)
    def test_losses(self, golden, golden_image_processor, case):
        batch_name, config = self.FORWARD[case]
        model = self.build(golden, case, **config)
        batch = golden_batch(golden, golden_image_processor, batch_name)
        with torch.no_grad():
            outputs = model(**batch)
        expected = golden.facts["forward"][case]
        assert outputs.text_loss.item() == pytest.approx(expected["loss_language"], rel=1e-5)
        assert outputs.visual_loss.item() == pytest.approx(expected["loss_image_ar"], rel=1e-5)
        assert outputs.loss.item() == pytest.approx(expected["total"], rel=1e-5)

    @pytest.mark.parametrize("case", ["mixed", "generation"])
    @torch.no_grad()
    def test_logits(self, golden, golden_model, golden_image_processor, case):
        batch = golden_batch(golden, golden_image_processor, case)
        visible = batch["attention_mask"].bool()
        logits = golden_model(**batch).logits[..., :PLACEHOLDER]
        assert_close(logits[visible], golden.tensors[f"{case}.logits"][visible])

    @pytest.mark.parametrize("case", ["mixed", "generation"])
    @torch.no_grad()
    def test_inputs_embeds(self, golden, golden_model, golden_image_processor, case):
        batch = golden_batch(golden, golden_image_processor, case)
        seen = {}
        hook = golden_model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        golden_model(**batch)
        hook.remove()
        visible = batch["attention_mask"].bool()
        assert_close(seen["inputs_embeds"][visible], golden.tensors[f"{case}.inputs_embeds"][visible])

    @pytest.mark.parametrize("case", ["mixed", "generation", "truncated"])
    @pytest.mark.parametrize("training", [True, False])
    def test_gradients(self, golden, golden_image_processor, case, training):
        model = golden.build_model().train(training)
        batch = golden_batch(golden, golden_image_processor, case)
        model(**batch).loss.backward()
        ours = dict(model.named_parameters())
        stored = [key for key in golden.tensors if key.startswith(f"{case}.grad.")]
        assert stored
        for key in stored:
            gradient = ours[rename_key(key.removeprefix(f"{case}.grad."), KEY_TABLE)].grad
            assert_close(gradient[: golden.tensors[key].shape[0]], golden.tensors[key])

    def test_understanding(self, golden, golden_image_processor):
        """The released code reports NaN here, though its gradients are those of the language loss alone."""
        batch = golden_batch(golden, golden_image_processor, "understanding")
        model = golden.build_model()
        outputs = model(**batch)
        expected = golden.facts["forward"]["understanding"]["loss_language"]
        assert outputs.text_loss.item() == pytest.approx(expected, rel=1e-5)
        assert outputs.visual_loss.item() == 0
        assert outputs.loss.item() == outputs.text_loss.item()
        outputs.loss.backward()
        assert all(not parameter.grad.any() for parameter in model.vision_head.parameters())

    @torch.no_grad()
    def test_text_without_images(self, golden, golden_model, golden_image_processor):
        batch = golden_batch(golden, golden_image_processor, "mixed")
        row = {key: batch[key][1:2, :10] for key in ("input_ids", "attention_mask", "labels")}
        expected = golden.facts["forward"]["text_only_without_images"]["total"]
        assert golden_model(**row).loss.item() == pytest.approx(expected, rel=1e-5)


IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6  # ids of the tiny tokenizer
PAD, END = 0, 1


@pytest.fixture
def batch():
    """Return three rows: an image in prompt and answer; an image in the answer, padded; and text."""
    image_ids = [IMAGE_START, *[IMAGE] * 4, IMAGE_END]
    rows = [[40, *image_ids, 41, 42, *image_ids, 43, END], [44, 45, 46, *image_ids, END], [47, 48, 49, 50, END]]
    prompt_lengths = [8, 2, 2]
    input_ids = torch.tensor([row + [PAD] * (17 - len(row)) for row in rows])
    labels = input_ids.masked_fill(input_ids == PAD, -100)
    for row, length in enumerate(prompt_lengths):
        labels[row, :length] = -100
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
    }


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestLosses:
    @staticmethod
    def slow_text_loss(logits, labels):
        losses = []
        for row_logits, row_labels in zip(logits.tolist(), labels.tolist()):
            for scores, label in zip(row_logits, row_labels[1:]):
                if label in (-100, IMAGE):
                    continue
                total = sum(math.exp(score) for token, score in enumerate(scores) if token != IMAGE)
                losses.append(math.log(total) - scores[label])
        return sum(losses) / len(losses)

    @staticmethod
    def slow_visual_loss(predictions, visual_tokens, input_ids, labels, loss_type, normalize):
        tokens = iter([token for image in visual_tokens.tolist() for token in image])
        losses = []
        for row, (ids, row_labels) in enumerate(zip(input_ids.tolist(), labels.tolist())):
            for position, (token, label) in enumerate(zip(ids, row_labels)):
                if token != IMAGE:
                    continue
                target = next(tokens)
                if label != IMAGE or position == 0:
                    continue
                prediction = predictions[row, position - 1].tolist()
                length = math.sqrt(sum(p * p for p in prediction))
                if normalize:
                    prediction = [p / length for p in prediction]
                    length = 1.0
                if loss_type == "cosine":
                    target_length = math.sqrt(sum(t * t for t in target))
                    dot = sum(p * t for p, t in zip(prediction, target))
                    losses.append(-dot / (length * target_length))
                elif loss_type == "l1":
                    losses.append(sum(abs(p - t) for p, t in zip(prediction, target)) / len(target))
                else:
                    losses.append(sum((p - t) ** 2 for p, t in zip(prediction, target)) / len(target))
        return sum(losses) / len(losses), len(losses)

    @pytest.mark.parametrize("loss_type", ["cosine", "l1", "mse"])
    @pytest.mark.parametrize("normalize", [True, False])
    @torch.no_grad()
    def test_plain_python_twin(self, tiny_model, batch, loss_type, normalize):
        model = tiny_model(visual_loss_type=loss_type, normalize_visual_tokens=normalize, visual_loss_weight=0.3)
        outputs = model(**batch, output_hidden_states=True)
        predictions = model.vision_head(outputs.hidden_states[-1])
        visual_tokens = model.get_visual_tokens(batch["pixel_values"])
        text_loss = self.slow_text_loss(outputs.logits, batch["labels"])
        visual_loss, count = self.slow_visual_loss(
            predictions, visual_tokens, batch["input_ids"], batch["labels"], loss_type, normalize
        )
        assert outputs.text_loss.item() == pytest.approx(text_loss, rel=1e-5)
        assert outputs.visual_loss.item() == pytest.approx(visual_loss, rel=1e-4, abs=1e-6)
        assert outputs.loss.item() == pytest.approx(text_loss + 0.3 * visual_loss, rel=1e-5)
        assert outputs.num_visual_labels.item() == count == 8
        assert outputs.num_text_labels.item() == 5 + 4 + 3

    def test_logits_are_left_out_in_training_only(self, tiny_model, batch):
        model = tiny_model()
        assert model(**batch).logits.shape == (3, 17, len(model.lm_head.weight))
        assert model.train()(**batch).logits is None
        del batch["labels"]
        assert model(**batch).logits is not None

    def test_halves_sum_to_the_whole(self, tiny_model, batch):
        model = tiny_model(visual_loss_weight=0.5)
        whole = gradients(model, **batch)
        halves = [
            {**{key: value[:1] for key, value in batch.items()}, "pixel_values": batch["pixel_values"][:2]},
            {**{key: value[1:] for key, value in batch.items()}, "pixel_values": batch["pixel_values"][2:]},
        ]
        counts = torch.tensor([12, 8])
        parts = [gradients(model, **half, num_items_in_batch=counts) for half in halves]
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-4, atol=1e-6)

    def test_image_start_and_end_are_text_targets(self, tiny_model, batch):
        labels = batch["labels"]
        only_marks = labels.masked_fill((labels != IMAGE_START) & (labels != IMAGE_END), -100)
        outputs = tiny_model()(**{**batch, "labels": only_marks})
        assert outputs.num_text_labels.item() == 4 and outputs.num_visual_labels.item() == 0
        assert outputs.text_loss.item() > 0 and outputs.visual_loss.item() == 0

    def test_nothing_to_learn(self, tiny_model, batch):
        model = tiny_model()
        labels = torch.full_like(batch["labels"], -100)
        assert model(**{**batch, "labels": labels}).loss.item() == 0
        assert all(not gradient.any() for gradient in gradients(model, **{**batch, "labels": labels}).values())

    def test_counts_of_zero(self, tiny_model, batch):
        labels = torch.full_like(batch["labels"], -100)
        outputs = tiny_model()(**{**batch, "labels": labels}, num_items_in_batch=torch.tensor([0, 0]))
        assert outputs.loss.item() == 0

    def test_batch_without_images(self, tiny_model, batch):
        text = {key: batch[key][2:, :5] for key in ("input_ids", "attention_mask", "labels")}
        model = tiny_model().train()
        outputs = model(**text)
        assert outputs.visual_loss.item() == 0 and outputs.loss.item() == outputs.text_loss.item() > 0
        grads = gradients(model, **text)
        # zero and not missing: data parallel training waits for every parameter
        assert all(not grads[name].any() for name in grads if name.startswith("vision_head."))
        assert any(name.startswith("vision_head.") for name in grads)

    def test_image_label_at_text(self, tiny_model, batch):
        batch["labels"][2, 3] = IMAGE
        with pytest.raises(ValueError, match="`labels` hold `image_token_id` where `input_ids` do not"):
            tiny_model()(**batch)

    def test_image_labels_without_images(self, tiny_model, batch):
        del batch["pixel_values"]
        with pytest.raises(ValueError, match="has 12 image token positions, but the images fill 0"):
            tiny_model()(**batch)

    def test_labels_need_ids(self, tiny_model, batch):
        model = tiny_model()
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        with pytest.raises(ValueError, match="`labels` need `input_ids`"):
            model(inputs_embeds=embeds, **batch)

    @torch.no_grad()
    @pytest.mark.parametrize("rows_at_once", [1, 1000])
    def test_accuracy_and_entropy(self, tiny_model, batch, monkeypatch, rows_at_once):
        """Compare with the logits of all positions, whether or not the losses are computed in chunks."""
        model = tiny_model()
        monkeypatch.setattr(modeling_metamorph, "MAX_LOGITS", rows_at_once * model.config.text_config.vocab_size)
        logits = model(**batch).logits.index_fill(-1, torch.tensor([IMAGE]), -torch.inf)[:, :-1]
        labels = batch["labels"][:, 1:]
        is_text = (labels != -100) & (labels != IMAGE)
        labels[is_text.nonzero()[::2].unbind(1)] = logits.argmax(-1)[is_text.nonzero()[::2].unbind(1)]
        outputs = model(**batch)
        distributions = torch.distributions.Categorical(logits=logits[is_text].clamp(min=-1e4))
        assert outputs.text_entropy.item() == pytest.approx(distributions.entropy().mean().item(), rel=1e-4)
        correct = (logits.argmax(-1) == labels)[is_text]
        assert outputs.text_accuracy.item() == pytest.approx(correct.float().mean().item())

    def test_image_token_takes_no_probability(self, tiny_model, batch):
        model = tiny_model()
        before = model(**batch).text_loss.item()
        model.lm_head.weight.data[IMAGE] *= 50
        assert model(**batch).text_loss.item() == before


class TestForward:
    @torch.no_grad()
    def test_count_mismatch(self, tiny_model, batch):
        model = tiny_model()
        for training in (False, True):
            with pytest.raises(ValueError, match=r"has 12 image token positions, but the images fill 8 \(2 images\)"):
                model.train(training)(**{**batch, "pixel_values": batch["pixel_values"][:2]})

    @torch.no_grad()
    @pytest.mark.parametrize("missing", ["an image", "a placeholder"])
    def test_count_mismatch_with_noise(self, tiny_model, batch, missing):
        model = tiny_model(visual_token_noise=1.0).train()
        if missing == "an image":
            batch["pixel_values"] = batch["pixel_values"][:2]
        else:
            batch["input_ids"][0, 2] = 60
        with pytest.raises(ValueError, match="image token positions, but the images fill"):
            model(**batch)

    @torch.no_grad()
    def test_visual_tokens_stand_for_pixels(self, tiny_model, batch):
        model = tiny_model()
        encoded = {**batch, "visual_tokens": model.get_visual_tokens(batch["pixel_values"])}
        encoded.pop("pixel_values")
        torch.testing.assert_close(model(**encoded).loss, model(**batch).loss, rtol=0, atol=0)
        torch.testing.assert_close(model(**encoded).logits, model(**batch).logits, rtol=0, atol=0)
        with pytest.raises(ValueError, match="Pass exactly one of `pixel_values` and `visual_tokens`"):
            model(**encoded, pixel_values=batch["pixel_values"])
        encoded["visual_tokens"] = encoded["visual_tokens"][:, :3]
        with pytest.raises(ValueError, match=r"has shape \(3, 3, 16\), expected \(images, 4, 16\)"):
            model(**encoded)

    @torch.no_grad()
    def test_inputs_embeds_stand_for_ids(self, tiny_model, batch):
        model = tiny_model()
        del batch["labels"]
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, expected, rtol=0, atol=0)

    @torch.no_grad()
    @pytest.mark.parametrize("training", [True, False])
    def test_noise(self, tiny_model, batch, training):
        """Noise is added to inputs only, not targets; to answer images only; and in training only."""
        model = tiny_model(visual_token_noise=1.0).train(training)
        clean = model.get_visual_tokens(batch["pixel_values"])
        fed_in = []
        model.model.projector.register_forward_pre_hook(lambda module, args: fed_in.append(args[0]))
        outputs = model(**batch)
        changed = ((fed_in[0] - clean).abs() > 1e-6).flatten(1).any(1).tolist()
        assert changed == [False, training, training]
        torch.testing.assert_close(fed_in[0].norm(dim=-1), torch.ones(3, 4))
        without = copy.deepcopy(model)
        without.config.visual_token_noise = without.model.config.visual_token_noise = 0.0
        assert (outputs.visual_loss != without(**batch).visual_loss).item() is training

    def test_gradient_checkpointing(self, tiny_model, batch):
        model = tiny_model().train()
        plain = gradients(model, **batch)
        model.gradient_checkpointing_enable()
        assert model.model.language_model.gradient_checkpointing
        for name, gradient in gradients(model, **batch).items():
            torch.testing.assert_close(gradient, plain[name])

    def test_bfloat16(self, tiny_model, batch):
        model = tiny_model().to(torch.bfloat16).train()
        outputs = model(**batch)
        outputs.loss.backward()
        assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()
        full = tiny_model()(**batch)
        assert outputs.visual_loss.item() == pytest.approx(full.visual_loss.item(), abs=0.05)
        assert model.model.get_visual_tokens(batch["pixel_values"]).dtype == torch.bfloat16

    @torch.no_grad()
    def test_tower_in_another_precision(self, tiny_model, batch):
        model = tiny_model()
        model.model.vision_tower.to(torch.bfloat16)
        assert model(**batch).loss.isfinite()

    @torch.no_grad()
    def test_quantised_projector(self, tiny_model, batch):
        """Integer weights, as in QLoRA, must not turn visual tokens into integers."""

        class Int8Linear(torch.nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.scale = linear.weight.abs().max() / 127
                self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), False)
                self.bias = linear.bias

            def forward(self, hidden):
                return torch.nn.functional.linear(hidden, self.weight * self.scale, self.bias)

        model = tiny_model()
        expected = model.get_image_features(batch["pixel_values"]).pooler_output
        for place in (0, 2):
            model.model.projector[place] = Int8Linear(model.model.projector[place])
        assert_close(model.get_image_features(batch["pixel_values"]).pooler_output, expected, 0.02)

    @torch.no_grad()
    def test_padding_changes_nothing(self, tiny_model, batch):
        model = tiny_model()
        alone = {key: value[1:2, :10] for key, value in batch.items() if key != "pixel_values"}
        alone["pixel_values"] = batch["pixel_values"][2:]
        torch.testing.assert_close(model(**alone).logits[0], model(**batch).logits[1, :10], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("reduction", ["interpolation", "concat_interpolation"])
    @pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
    @pytest.mark.parametrize("head", ["linear", "mlp", "mlp2x_gelu"])
    def test_shapes(self, tiny_model, batch, reduction, projector, head):
        model = tiny_model(token_reduction=reduction, projector_type=projector, vision_head_type=head)
        width = 64 if reduction == "concat_interpolation" else 16
        assert model.get_visual_tokens(batch["pixel_values"]).shape == (3, 4, width)
        assert model(**batch).image_outputs.pooler_output.shape == (3, 4, 32)
        del batch["labels"]
        assert model(**batch).next_visual_token.shape == (3, 1, width)
        layers = [type(layer) for layer in model.vision_head]
        assert layers.count(torch.nn.Linear) == {"linear": 1, "mlp": 2, "mlp2x_gelu": 3}[head]


TEXT_CONFIGS = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gpt2": {},
    "bloom": {},  # no limit of positions and no static cache
    "mamba": {"state_size": 8},  # no attention
}
VISION_CONFIGS = {
    "clip_vision_model": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}


class TestOtherParts:
    """Any causal language model works with any vision transformer."""

    @pytest.mark.parametrize("model_type", ["rwkv", "recurrent_gemma", "minimax"])
    def test_language_models_with_a_cache_of_their_own(self, tiny_model, model_type):
        with pytest.raises(ValueError, match=f"{model_type} models have no cache"):
            tiny_model(text_config=AutoConfig.for_model(model_type, vocab_size=263, hidden_size=32))

    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("model_type", TEXT_CONFIGS)
    def test_language_models(self, tiny_model, batch, tmp_path, model_type, tie):
        text_config = AutoConfig.for_model(
            model_type,
            vocab_size=263,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=PAD,
            eos_token_id=END,
            bos_token_id=None,
            tie_word_embeddings=tie,
            **TEXT_CONFIGS[model_type],
        )
        model = tiny_model(text_config=text_config)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tie
        outputs = model(**batch)
        outputs.loss.backward()
        assert outputs.loss.isfinite() and model.model.projector[0].weight.grad.any()
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tie
        torch.testing.assert_close(loaded(**batch).loss, outputs.loss)
        prompt = torch.tensor([[40, 41, IMAGE_START]])
        options = [{"use_cache": False}, {}, {} if model_type == "bloom" else {"cache_implementation": "static"}]
        uncached, dynamic, static = (
            model.generate(prompt, max_new_tokens=8, do_sample=False, **kwargs).tolist() for kwargs in options
        )
        assert uncached == dynamic == static
        assert uncached[0][3:8] == [IMAGE] * 4 + [IMAGE_END]
        if model_type == "mamba":  # its cache does not say how much it has read, so transformers reads all again
            return
        cache, options = DynamicCache(config=text_config), {"do_sample": False, "max_new_tokens": 8}
        first = model.generate(prompt, **options, cache=cache, return_dict_in_generate=True)
        question = torch.cat([first.sequences, torch.tensor([[50, IMAGE_START]])], dim=1)
        everything = model.generate(question, **options, visual_tokens=first.visual_tokens[0])
        assert model.generate(question, **options, cache=cache).tolist() == everything.tolist()

    @torch.no_grad()
    @pytest.mark.parametrize("model_type", VISION_CONFIGS)
    def test_vision_towers(self, tiny_model, batch, model_type):
        """Class and register tokens are dropped, and the states are those before the final norm."""
        vision_config = AutoConfig.for_model(
            model_type,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            **VISION_CONFIGS[model_type],
        )
        model = tiny_model(vision_config=vision_config, num_image_tokens=16, normalize_visual_tokens=False)
        last_layer = [
            module for module in model.model.vision_tower.modules() if type(module).__name__.endswith("Layer")
        ]
        seen = []
        last_layer[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        visual_tokens = model.get_visual_tokens(batch["pixel_values"])
        output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        torch.testing.assert_close(visual_tokens, output[:, -16:])
        assert output.shape[1] > 16
        ids = torch.full((3, 17), IMAGE)
        ids[:, 0] = 40
        outputs = model(input_ids=ids, pixel_values=batch["pixel_values"], is_causal=True)  # for the language model
        assert torch.equal(outputs.image_outputs.visual_tokens, visual_tokens)

    def test_patches_that_are_no_square(self, tiny_model):
        with pytest.raises(ValueError, match="returned 12 patches per image, which do not form a square grid"):
            tiny_model().model.reduce_patches(torch.zeros(1, 12, 16))

    @torch.no_grad()
    def test_ids_outside_the_vocabulary(self, tiny_model, batch):
        """Refuse a language model whose embeddings were not resized."""
        model = tiny_model(image_token_id=300)
        with pytest.raises(ValueError, match="300.*vocabulary of 263.*resize_token_embeddings"):
            model(input_ids=batch["input_ids"][2:])
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            model.generate(torch.tensor([[IMAGE_START]]), max_new_tokens=8)
        model.resize_token_embeddings(301)
        batch["input_ids"][batch["input_ids"] == IMAGE] = 300
        batch["labels"][batch["labels"] == IMAGE] = 300
        assert model(**batch).loss.isfinite()
        generated = model.generate(torch.tensor([[40, IMAGE_START]]), max_new_tokens=5)
        assert generated[0].tolist() == [40, IMAGE_START, *[300] * 4, IMAGE_END]


class TestSaving:
    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
    def test_auto_classes(self, tiny_model, batch, tmp_path, auto_class):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is MetaMorphForConditionalGeneration and not loaded.training
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0, atol=0)
        generated = loaded.generate(torch.tensor([[40, IMAGE_START]]), max_new_tokens=5, return_dict_in_generate=True)
        assert generated.visual_tokens[0].shape == (1, 4, 16)

    def test_configuration(self, tiny_config, tmp_path):
        config = tiny_config(visual_loss_type="l1", visual_token_noise=0.5, num_image_tokens=9)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        loaded._name_or_path = config._name_or_path
        assert type(loaded) is MetaMorphConfig and loaded.to_dict() == config.to_dict()
        assert type(loaded.text_config) is type(config.text_config)
        assert type(loaded.vision_config) is type(config.vision_config)

    def test_missing_tower_is_initialized_like_a_new_one(self, tiny_config):
        """SigLIP initializes its attention and MLP as a whole, not layer by layer."""
        model = MetaMorphForConditionalGeneration.from_pretrained(None, config=tiny_config(), state_dict={})
        layer = model.model.vision_tower.encoder.layers[0]
        assert 0 < layer.mlp.fc1.bias.abs().max() < 1e-5  # a plain linear layer would have zeros
        bound = (6 / (16 + 16)) ** 0.5  # Glorot's, uniform
        assert 0.9 * bound < layer.self_attn.q_proj.weight.abs().max() <= bound

    def test_base_model(self, tiny_model, batch, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        base = MetaMorphModel.from_pretrained(tmp_path)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        expected = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(base(**inputs).last_hidden_state, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("where", ["text_config", "composite"])
    def test_tied_embeddings(self, tiny_config, tiny_model, tmp_path, where):
        text_config = tiny_config().text_config
        text_config.tie_word_embeddings = where == "text_config"
        model = tiny_model(text_config=text_config, tie_word_embeddings=True if where == "composite" else None)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        for tied in (model, loaded):
            assert tied.lm_head.weight.data_ptr() == tied.get_input_embeddings().weight.data_ptr()
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


class TestConfig:
    def test_default_is_the_paper(self):
        config = MetaMorphConfig()
        assert (config.text_config.model_type, config.text_config.hidden_size) == ("llama", 4096)
        assert (config.vision_config.model_type, config.vision_config.hidden_size) == ("siglip_vision_model", 1152)
        assert (config.num_image_tokens, config.grid_side, config.visual_token_dim) == (64, 8, 1152)
        assert config.text_config.vocab_size == 1 + config.image_token_id

    def test_number_of_tokens_is_a_square(self, tiny_config):
        with pytest.raises(ValueError, match="num_image_tokens is 60.*square number"):
            tiny_config(num_image_tokens=60)

    @pytest.mark.parametrize("name", ["visual_loss_weight", "visual_token_noise"])
    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
    def test_weights_are_numbers(self, tiny_config, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be 0 or a larger finite number"):
            tiny_config(**{name: value})

    @pytest.mark.parametrize("count", [0, -4])
    def test_there_are_visual_tokens(self, tiny_config, count):
        with pytest.raises(ValueError, match=f"num_image_tokens is {count}"):
            tiny_config(num_image_tokens=count)

    def test_ids_are_distinct(self, tiny_config):
        with pytest.raises(ValueError, match=r"are \(5, 5, 6\), but must be distinct"):
            tiny_config(image_token_id=5)

    def test_the_callers_objects_stay_as_they_are(self, tiny_config):
        parts = {"text_config": tiny_config().text_config, "vision_config": SiglipVisionConfig(vision_use_head=True)}
        before = {name: part.to_dict() for name, part in parts.items()}
        config = MetaMorphConfig(**parts)
        assert {name: part.to_dict() for name, part in parts.items()} == before
        assert config.vision_config.vision_use_head is False

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("asked", [True, False, None])
    def test_tying_is_as_asked(self, tiny_config, tied, asked):
        text_config = tiny_config().text_config
        text_config.tie_word_embeddings = tied
        config = tiny_config(text_config=text_config, tie_word_embeddings=asked)
        assert config.tie_word_embeddings is (tied if asked is None else asked)

    @pytest.mark.parametrize("name", ["token_reduction", "projector_type", "vision_head_type", "visual_loss_type"])
    def test_unknown_choice(self, tiny_config, name):
        with pytest.raises((StrictDataclassError, ValueError), match=name):
            tiny_config(**{name: "poem"})

    @pytest.mark.parametrize("name", ["visual_loss_weight", "visual_token_noise"])
    def test_whole_numbers(self, tiny_config, name):
        assert getattr(tiny_config(**{name: 1}), name) == 1
        with pytest.raises(StrictDataclassError, match=name):
            tiny_config(**{name: True})
