"""The trainer's loss of text labels, by TRL's fused head, against the model's own, which computes the logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from metamorph_hf.vpit import text_loss
from metamorph_hf.vpit.text_loss import measure_text


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Several tiles, the last of which is narrower."""
    monkeypatch.setattr(text_loss, "TILE_WIDTH", 50)


def measure(function, model, count: int, **autocast) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the measures of `count` positions, and the gradients of a weighted sum of their losses."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(count, model.lm_head.in_features, generator=generator, requires_grad=True)
    labels = torch.randint(8, model.lm_head.out_features, (count,), generator=generator)
    with torch.no_grad():  # every second prediction is right
        logits = model.lm_head(hidden_states).index_fill(-1, torch.tensor(model.config.image_token_id), -torch.inf)
        labels[::2] = logits.argmax(-1)[::2]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        found = function(model, hidden_states, labels)
    (found[0] * torch.arange(1, count + 1)).sum().backward()
    return found.detach(), {"hidden": hidden_states.grad} | {n: p.grad for n, p in model.lm_head.named_parameters()}


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_the_models_own(tiny_model, narrow_tiles, count, has_bias, half, tolerance):
    model = tiny_model().train()
    if has_bias:
        model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features))
    expected, expected_gradients = measure(type(model).measure_text, model, count, enabled=half)
    found, gradients = measure(measure_text, model, count, enabled=half)
    assert found.dtype == torch.float32 and found.shape == (3, count)
    rows = [0, 2] if half else [0, 1, 2]  # rounded logits may have two maxima
    torch.testing.assert_close(found[rows], expected[rows], rtol=tolerance, atol=tolerance)
    assert found[1].sum() >= count / 2 - 1
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference <= tolerance * expected_gradients[name].norm(), name
    # The image token takes no probability.
    assert gradients["weight"][model.config.image_token_id].count_nonzero() == 0


def test_logits_are_never_whole(tiny_model, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: pytest.fail("lm_head computed all logits"))
    model = tiny_model().train()
    measure_text(model, torch.randn(3, model.lm_head.in_features), torch.arange(8, 11))


@pytest.mark.parametrize("kind", ["adapter", "quantized", "sharded", "replaced", "half"])
def test_heads_that_are_called(tiny_model, kind):
    """Their weights alone would give other logits, or cost more memory."""
    model, calls = tiny_model(tie_word_embeddings=False).train(), []
    if kind == "adapter":
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config).base_model.model
    elif kind == "quantized":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.as_subclass(type("Packed", (torch.Tensor,), {})))
    elif kind == "sharded":
        model.lm_head.weight.ds_id = 0
    elif kind == "replaced":
        model.lm_head.forward = model.lm_head.forward
    else:
        model.lm_head.to(torch.bfloat16)
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    hidden_states = torch.randn(3, model.lm_head.in_features, dtype=model.lm_head.weight.dtype)
    measure_text(model, hidden_states, torch.arange(8, 11))
    assert calls
