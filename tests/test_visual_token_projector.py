import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metamorph_hf import VisualTokenProjector


VISUALIZER = Path(__file__).parent / "golden" / "visualizer"


def tiny_projector(**kwargs) -> VisualTokenProjector:
    sizes = {"visual_token_dim": 6, "cross_attention_dim": 10, "hidden_dim": 8, "num_image_tokens": 4}
    return VisualTokenProjector(**{**sizes, "sequence_length": 7, **kwargs})


class TestReleasedNumbers:
    @pytest.mark.parametrize("name", ["mlp_2_layers", "mlp_3_layers"])
    def test_states_are_those_of_the_released_adapter(self, name):
        released = json.loads((VISUALIZER / name / "model_config.json").read_text())
        golden = load_file(VISUALIZER / "golden.safetensors")
        projector = VisualTokenProjector(
            visual_token_dim=released["input_dim"],
            cross_attention_dim=released["output_dim"],
            num_layers=released["num_layers"],
            hidden_dim=released["hidden_dim"],
            num_image_tokens=golden["input"].shape[1],
        )
        checkpoint = torch.load(VISUALIZER / name / "adapter_checkpoint.pt", weights_only=True, map_location="cpu")
        weights = {key.replace("layers.", "linears."): value for key, value in checkpoint["model_state_dict"].items()}
        projector.load_state_dict(weights)

        with torch.no_grad():
            states = projector(golden["input"])

        expected = golden[f"{name}.output"]
        assert states.shape == (2, 77, 24)
        torch.testing.assert_close(states[:, :16], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert not states[:, 16:].any()
        if name == "mlp_3_layers":  # the one that conditions the golden U-Net
            condition = golden["unet.condition"]
            torch.testing.assert_close(states, condition, rtol=0, atol=1e-5 * condition.abs().max().item())


class TestVisualTokenProjector:
    def test_pads_with_zeros_on_the_right(self):
        tokens = torch.randn(2, 4, 6)
        padded = tiny_projector()(tokens)
        assert padded.shape == (2, 7, 10)
        assert padded[:, :4].any(-1).all()
        assert not padded[:, 4:].any()

    def test_no_sequence_length_means_no_padding(self):
        assert tiny_projector(sequence_length=None)(torch.randn(2, 4, 6)).shape == (2, 4, 10)

    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    def test_number_of_layers(self, num_layers):
        projector = tiny_projector(num_layers=num_layers)
        assert len(projector.linears) == len(projector.norms) == num_layers
        assert projector(torch.randn(1, 4, 6)).shape == (1, 7, 10)

    def test_survives_saving(self, tmp_path):
        projector, tokens = tiny_projector(), torch.randn(2, 4, 6)
        projector.save_pretrained(tmp_path)
        again = VisualTokenProjector.from_pretrained(tmp_path)
        assert again.config.sequence_length == 7
        assert torch.equal(again(tokens), projector(tokens))
        assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()

    def test_unknown_type_names_the_known_one(self):
        with pytest.raises(ValueError, match="'xattn', but only 'mlp' is known"):
            tiny_projector(projector_type="xattn")

    def test_too_many_tokens_for_the_sequence(self):
        with pytest.raises(ValueError, match="is 4, which does not fit in a `sequence_length` of 3"):
            tiny_projector(sequence_length=3)

    @pytest.mark.parametrize("shape", [(2, 5, 6), (2, 4, 7), (4, 6)])
    def test_wrong_shape_says_both(self, shape):
        with pytest.raises(ValueError, match=r"\(images, 4, 6\), but got \(" + ", ".join(map(str, shape))):
            tiny_projector()(torch.randn(shape))
