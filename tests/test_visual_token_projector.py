import pytest
import torch

from metamorph_hf import VisualTokenProjector


def tiny_projector(**kwargs) -> VisualTokenProjector:
    sizes = {"visual_token_dim": 6, "cross_attention_dim": 10, "hidden_dim": 8, "num_image_tokens": 4}
    return VisualTokenProjector(**{**sizes, "sequence_length": 7, **kwargs})


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
        assert len(projector.projection.linears) == len(projector.projection.norms) == num_layers
        assert projector(torch.randn(1, 4, 6)).shape == (1, 7, 10)

    def test_survives_saving(self, tmp_path):
        projector, tokens = tiny_projector(), torch.randn(2, 4, 6)
        projector.save_pretrained(tmp_path)
        again = VisualTokenProjector.from_pretrained(tmp_path)
        assert again.config.sequence_length == 7
        assert torch.equal(again(tokens), projector(tokens))
        assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()

    @pytest.mark.parametrize("projector_type", ["xattn", "xattnffn", "transformer"])
    def test_learned_queries(self, projector_type, tmp_path):
        torch.manual_seed(0)
        projector = tiny_projector(projector_type=projector_type, num_queries=3, num_heads=2).eval()
        tokens = torch.randn(2, 4, 6)
        states = projector(tokens)
        assert states.shape == (2, 7, 10)
        assert states[:, :3].any(-1).all() and not states[:, 3:].any()
        torch.testing.assert_close(projector(tokens[1:]), states[1:])
        # Attention has no order: the queries see a set of visual tokens.
        torch.testing.assert_close(projector(tokens.flip(1)), states)
        projector.save_pretrained(tmp_path)
        assert torch.equal(VisualTokenProjector.from_pretrained(tmp_path)(tokens), states)

    def test_any_number_of_tokens(self):
        projector = tiny_projector(num_image_tokens=None)
        assert projector(torch.randn(2, 3, 6)).shape == projector(torch.randn(2, 5, 6)).shape == (2, 7, 10)
        with pytest.raises(ValueError, match="8 states per image do not fit"):
            projector(torch.randn(2, 8, 6))

    def test_unknown_type_names_the_known_ones(self):
        with pytest.raises(ValueError, match="'mixer', but must be one of mlp, xattn"):
            tiny_projector(projector_type="mixer", num_queries=3)

    @pytest.mark.parametrize("kwargs", [{"num_queries": 3}, {"projector_type": "xattn"}])
    def test_number_of_queries_must_suit_the_type(self, kwargs):
        with pytest.raises(ValueError, match="`num_queries` is"):
            tiny_projector(**kwargs)

    def test_too_many_tokens_for_the_sequence(self):
        with pytest.raises(ValueError, match="4 states per image do not fit into `sequence_length`=3"):
            tiny_projector(sequence_length=3)

    @pytest.mark.parametrize("shape", [(2, 5, 6), (2, 4, 7), (4, 6)])
    def test_wrong_shape_says_both(self, shape):
        with pytest.raises(ValueError, match=r"\(images, 4, 6\), but got \(" + ", ".join(map(str, shape))):
            tiny_projector()(torch.randn(shape))

    @pytest.mark.parametrize("learned", [False, True])
    def test_unconditional_states(self, learned, tmp_path):
        projector, tokens = tiny_projector(learned_unconditional=learned), torch.randn(3, 4, 6)
        kept = torch.tensor([True, False, True])
        states = projector(tokens, kept)
        assert torch.equal(states[kept], projector(tokens)[kept])
        assert not states[1].any()  # learned states start as zeros, too
        if learned:
            states.sum().backward()
            assert projector.unconditional.grad.unique().tolist() == [1.0]  # from the image that was not kept
            torch.nn.init.normal_(projector.unconditional)
            assert torch.equal(projector(tokens, kept)[1], projector.unconditional)
        projector.save_pretrained(tmp_path)
        again = VisualTokenProjector.from_pretrained(tmp_path)
        assert again.config.learned_unconditional == learned
        assert torch.equal(again(tokens, kept), projector(tokens, kept))

    def test_learned_unconditional_states_need_a_number(self):
        with pytest.raises(ValueError, match="needs `sequence_length` or `num_image_tokens`"):
            tiny_projector(learned_unconditional=True, num_image_tokens=None, sequence_length=None)
