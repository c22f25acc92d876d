import pytest
import torch

from metamorph_hf import GridUNet2DConditionModel


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
