import jax
import numpy as np
import pytest
import torch

from vlm_jax.ops.activations import ACTIVATIONS
from vlm_jax.ops.patches import patchify, resize_positions


def test_patches_are_row_major_and_pixels_row_column_channel():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(jax.jit(patchify, static_argnums=1)(images, 2))
    assert patches.shape == (2, 6, 12)
    for image, row, column in np.ndindex(2, 2, 3):
        square = images[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[image, 3 * row + column], square.ravel())


@pytest.mark.parametrize("shape", [(5, 4), (4, 6)])
def test_a_picture_that_does_not_divide_is_an_error(shape):
    with pytest.raises(ValueError, match=rf"{shape[0]}x{shape[1]} pixels.*patches of 4"):
        patchify(np.zeros((1, *shape, 3)), 4)


def test_positions_of_the_learned_grid_are_left_alone():
    table = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, (4, 4)), table)


@pytest.mark.parametrize("grid", [(8, 8), (3, 3), (7, 5), (4, 6), (1, 9)])
@pytest.mark.parametrize("antialias", [False, True])
def test_positions_of_other_grids_are_torchs_bicubic(grid, antialias):
    table = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    square = torch.tensor(table).reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
    resize = torch.nn.functional.interpolate
    expected = resize(square, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    ours = jax.jit(resize_positions, static_argnums=(1, 2))(table, grid, antialias)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_activations_are_torchs():
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    wave = torch.tensor(x)
    functional = torch.nn.functional
    expected = {
        "gelu": functional.gelu(wave),
        "gelu_tanh": functional.gelu(wave, approximate="tanh"),
        "quick_gelu": wave * torch.sigmoid(1.702 * wave),
        "relu": functional.relu(wave),
        "squared_relu": functional.relu(wave) ** 2,
        "silu": functional.silu(wave),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x), value.numpy(), atol=1e-6, err_msg=name)
