import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from metamorph_hf import GridUNet2DConditionModel, PatchAutoencoder


@pytest.fixture
def unet() -> GridUNet2DConditionModel:
    torch.manual_seed(0)
    return GridUNet2DConditionModel(
        in_channels=6,
        out_channels=6,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        cross_attention_dim=8,
        grid_channels=4,
    ).eval()


@torch.no_grad()
def test_each_token_reaches_its_part_of_the_image(unet):
    """At `conv_in`, before positions mix, a token reaches its block of 2x2 cells and a border of one cell."""
    seen = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sample, states = torch.randn(1, 6, 8, 8), torch.randn(1, 16, 8)
    changed = states.clone()
    changed[:, 6] += 1.0  # row 1, column 2 of the 4x4 grid
    for tokens in (states, changed):
        unet(sample, 10, tokens)
    positions = (seen[0] != seen[1]).any(1)[0].nonzero()
    assert positions.min(0).values.tolist() == [1, 3]
    assert positions.max(0).values.tolist() == [4, 6]


@torch.no_grad()
def test_batch_equals_one_by_one(unet):
    sample, states, times = torch.randn(3, 6, 8, 8), torch.randn(3, 16, 8), torch.tensor([0, 400, 999])
    batch = unet(sample, times, states).sample
    assert batch.shape == sample.shape
    for row in range(3):
        alone = unet(sample[row : row + 1], times[row], states[row : row + 1]).sample
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_save_and_load(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = GridUNet2DConditionModel.from_pretrained(tmp_path)
    inputs = (torch.randn(1, 6, 8, 8), 5, torch.randn(1, 16, 8))
    assert torch.equal(unet(*inputs).sample, loaded(*inputs).sample)


def test_padded_states_are_refused(unet):
    with pytest.raises(ValueError, match="77 states do not form a square grid"):
        unet(torch.randn(1, 6, 8, 8), 5, torch.randn(1, 77, 8))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(60, 3, 4, 4, generator=generator), size=(16, 16), mode="bilinear"
    )
    return smooth * 2 - 1


class TestPatchAutoencoder:
    @pytest.fixture
    def autoencoder(self) -> PatchAutoencoder:
        torch.manual_seed(0)
        model = PatchAutoencoder(latent_channels=5, patch_size=4, width=8, scaling_factor=0.5).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("out.weight"):  # a new block is the identity
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    @torch.no_grad()
    def test_shapes_types_and_batches(self, autoencoder, images):
        latents = autoencoder.encode(images).latent_dist
        assert latents.mode().shape == (60, 5, 4, 4) and latents.mode().dtype == torch.float32
        assert torch.equal(latents.sample(), latents.mode())
        (also,) = autoencoder.encode(images, return_dict=False)
        assert torch.equal(also.mode(), latents.mode())
        decoded = autoencoder.decode(latents.mode()).sample
        assert decoded.shape == images.shape
        assert torch.equal(autoencoder.decode(latents.mode(), return_dict=False)[0], decoded)
        torch.testing.assert_close(autoencoder.decode(latents.mode()[7:8]).sample, decoded[7:8], rtol=1e-4, atol=1e-5)
        half = autoencoder.to(torch.bfloat16)
        assert half.decode(half.encode(images.bfloat16()).latent_dist.mode()).sample.dtype == torch.bfloat16

    @torch.no_grad()
    def test_moves_in_before_it_runs(self, autoencoder, images):
        """As pipelines with offloading expect of an autoencoder, whose `forward` they do not call."""
        calls = []

        class Hook(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                calls.append(module)
                return args, kwargs

        add_hook_to_module(autoencoder, Hook())
        autoencoder.decode(autoencoder.encode(images).latent_dist.mode())
        assert len(calls) == 2

    @torch.no_grad()
    def test_save_and_load(self, autoencoder, images, tmp_path):
        autoencoder.save_pretrained(tmp_path)
        loaded = PatchAutoencoder.from_pretrained(tmp_path)
        assert loaded.config.scaling_factor == 0.5 and loaded.config.patch_size == 4
        assert torch.equal(loaded.encode(images).latent_dist.mode(), autoencoder.encode(images).latent_dist.mode())

    @torch.no_grad()
    def test_refiner_starts_as_no_correction(self, autoencoder, images, tmp_path):
        refined = PatchAutoencoder.from_config(autoencoder.config, refiner_layers=2, refiner_width=6).eval()
        assert refined.load_state_dict(autoencoder.state_dict(), strict=False).unexpected_keys == []
        latents = autoencoder.encode(images).latent_dist.mode()
        expected = autoencoder.decode(latents).sample
        assert torch.equal(refined.decode(latents).sample, expected)
        torch.nn.init.normal_(refined.refiner[-2].weight)
        corrected = refined.decode(latents).sample
        assert corrected.shape == images.shape and not torch.allclose(corrected, expected)
        refined.save_pretrained(tmp_path)
        assert torch.equal(PatchAutoencoder.from_pretrained(tmp_path).decode(latents).sample, corrected)

    @torch.no_grad()
    def test_refiner_knows_where_its_cells_are(self, autoencoder):
        """Before its blocks mix positions, a latent's state reaches the 4x4 cells of its own window of 8x8 pixels."""
        refiner = PatchAutoencoder.from_config(autoencoder.config, refiner_layers=1).refiner[0]
        states = torch.zeros(1, 8, 4, 4)
        states[0, :, 1, 2] = 1
        is_reached = (refiner(states) != refiner(torch.zeros_like(states))).any(1)[0]
        rows, columns = is_reached.nonzero().T
        assert is_reached.shape == (8, 8) and is_reached.sum() == 16
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 4, 3, 6)

    @torch.no_grad()
    def test_patches_overlap_by_half(self, autoencoder):
        """Each latent adds a window of 8x8 pixels, 4 pixels apart: a plain sum of windows gives the same image."""
        states, deconv = torch.randn(1, 8, 4, 4), autoencoder.decoder[-1]
        canvas = torch.zeros(3, 20, 20)
        for row in range(4):
            for column in range(4):
                window = torch.einsum("i,ichw->chw", states[0, :, row, column], deconv.weight)
                canvas[:, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] += window
        expected = canvas[:, 2:-2, 2:-2] + deconv.bias.view(3, 1, 1)
        torch.testing.assert_close(deconv(states)[0], expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_constant_latents_leave_no_grid_under_a_smooth_window(self, autoencoder):
        """Windows that fade towards their edges, as training makes them, sum up to a plain color."""
        ramp = torch.tensor([1, 3, 5, 7, 7, 5, 3, 1]) / 8
        autoencoder.decoder[-1].weight.copy_(torch.outer(ramp, ramp) * torch.randn(8, 3, 1, 1))
        decoded = autoencoder.decode(torch.ones(1, 5, 12, 12)).sample[0, :, 16:-16, 16:-16]
        assert decoded.abs().max() > 0.1
        torch.testing.assert_close(decoded, decoded[:, :1, :1].expand_as(decoded), rtol=1e-4, atol=1e-4)

    def test_odd_patches_are_refused(self):
        with pytest.raises(ValueError, match="patch_size is 5, but patches that overlap by half need an even one"):
            PatchAutoencoder(patch_size=5)
        with pytest.raises(ValueError, match="patch_size is 6, but the refiner needs a multiple of 4"):
            PatchAutoencoder(patch_size=6, refiner_layers=1)
