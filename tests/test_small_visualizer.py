import numpy as np
import pytest
import torch

from metamorph_hf import GridUNet2DConditionModel, PatchVAE


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
def test_each_token_lies_where_its_quarter_of_the_picture_is(unet):
    """Seen at `conv_in`, before anything mixes places: a token reaches its block of 2x2 and a border of one."""
    seen = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sample, states = torch.randn(1, 6, 8, 8), torch.randn(1, 16, 8)
    changed = states.clone()
    changed[:, 6] += 1.0  # row 1, column 2 of the 4x4 grid
    for tokens in (states, changed):
        unet(sample, 10, tokens)
    places = (seen[0] != seen[1]).any(1)[0].nonzero()
    assert places.min(0).values.tolist() == [1, 3]
    assert places.max(0).values.tolist() == [4, 6]


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
    with pytest.raises(ValueError, match="77 positions, which is no square grid"):
        unet(torch.randn(1, 6, 8, 8), 5, torch.randn(1, 77, 8))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(60, 3, 4, 4, generator=generator), size=(16, 16), mode="bilinear"
    )
    return smooth * 2 - 1


def principal_components(pictures: torch.Tensor, count: int, patch: int) -> np.ndarray:
    """Reconstruction by numpy's SVD of patches cut out one by one."""
    cut = [
        picture[:, y : y + patch, x : x + patch].numpy().reshape(-1).astype(np.float64)
        for picture in pictures
        for y in range(0, picture.shape[1], patch)
        for x in range(0, picture.shape[2], patch)
    ]
    patches = np.stack(cut)
    mean = patches.mean(0)
    _, _, directions = np.linalg.svd(patches - mean, full_matrices=False)
    kept = directions[:count]
    return mean + (patches - mean) @ kept.T @ kept, patches


def test_reconstructs_as_well_as_principal_components(pictures):
    expected, patches = principal_components(pictures, 6, 4)
    vae = PatchVAE.fit(pictures, latent_channels=6, patch_size=4)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        painted = vae.decode(latents).sample
    assert latents.shape == (60, 6, 4, 4)
    error = (painted - pictures).square().mean().item()
    best = np.square(expected - patches).mean()
    # Only the mean patch, held as one value per channel, may cost a little.
    assert best <= error + 1e-9 < best * 1.05


def test_latents_are_centred_uncorrelated_and_of_unit_scale(pictures):
    vae = PatchVAE.fit(pictures, latent_channels=6, patch_size=4)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    columns = latents.permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(columns.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    covariance = columns.T @ columns / len(columns)
    assert covariance.diagonal().mean().item() == pytest.approx(1.0, rel=1e-3)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3


def test_posterior_has_the_noise_that_is_left(pictures):
    vae = PatchVAE.fit(pictures, latent_channels=6, patch_size=4)
    posterior = vae.encode(pictures).latent_dist
    samples = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(200)])
    torch.testing.assert_close(samples.std(0).mean((0, 2, 3)), posterior.std[0, :, 0, 0], rtol=0.05, atol=1e-6)


def test_save_and_load_vae(pictures, tmp_path):
    vae = PatchVAE.fit(pictures, latent_channels=6, patch_size=4)
    vae.save_pretrained(tmp_path)
    loaded = PatchVAE.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == vae.config.scaling_factor
    assert torch.equal(loaded.encode(pictures).latent_dist.mode(), vae.encode(pictures).latent_dist.mode())


@pytest.mark.parametrize("arguments", [{"patch_size": 5}, {"patch_size": 4, "latent_channels": 48}])
def test_refuses_what_cannot_be_fitted(pictures, arguments):
    with pytest.raises(ValueError, match="the sides must be multiples of the patch"):
        PatchVAE.fit(pictures, **arguments)
