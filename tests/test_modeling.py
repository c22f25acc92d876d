import copy

import pytest
import torch
from conftest import PLACEHOLDER, released_to_ours


GOLDEN_IMAGES = ("gradient", "shapes", "gray", "rgba")
RELEASED_PLACEHOLDER = -200
N = 16


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest value: logits reach 30, where an absolute 1e-5 rejects correct code."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"off by {error:.1e} of the largest value"


def golden_batch(golden, golden_image_processor, case):
    """A batch of the released collator in our form: N placeholders per image, `labels` say which are targets."""
    tensors, length = golden.tensors, golden.tensors[f"{case}.expanded_labels"].shape[1]
    image_files = list(golden.facts["forward"][case]["image_files"])
    rows, kept = [], []
    for row in tensors[f"{case}.input_ids"].tolist():
        expanded, fits = [], True
        for token in row:
            if token == RELEASED_PLACEHOLDER:
                # The released code drops an image that does not fit, and all after it ("truncated").
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
    """The released implementation's visual path, at 1e-5 of each tensor's largest value."""

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
    def test_unnormalised(self, golden, pixel_values):
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
        """A library upgrade, or a configuration entry, must not turn visual tokens into post-norm features."""
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
    """Losses, logits and gradients of the released implementation's batches."""

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
        head = {k.removeprefix(f"{case}."): v for k, v in golden.tensors.items() if k.startswith(f"{case}.vision_head")}
        model.load_state_dict({released_to_ours(key): value for key, value in head.items()}, strict=False)
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
            gradient = ours[released_to_ours(key.removeprefix(f"{case}.grad."))].grad
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
