"""Axis letters as in vlm_jax/data/augment.py."""

import numpy as np
from data_helpers import random_pixels

from vlm_jax.config import AugmentConfig
from vlm_jax.data.augment import augment


def test_augment_flips():
    image, seen = random_pixels(4, 4), set()
    for seed in range(30):
        got = augment(image, AugmentConfig(flip=True), np.random.default_rng(seed))
        seen.add(got.tobytes())
    assert seen == {np.ascontiguousarray(image[::a, ::b]).tobytes() for a in (1, -1) for b in (1, -1)}


def test_augment_mirrors_left_and_right_alone():
    image = random_pixels(4, 4)
    seen = {augment(image, AugmentConfig(mirror=True), np.random.default_rng(seed)).tobytes() for seed in range(30)}
    assert seen == {image.tobytes(), np.ascontiguousarray(image[:, ::-1]).tobytes()}


def test_augment_shifts_repeat_the_border():
    image, seen = random_pixels(6, 6), set()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    for seed in range(300):
        seen.add(augment(image, AugmentConfig(shift=2), np.random.default_rng(seed)).tobytes())
    assert seen == {np.ascontiguousarray(padded[i : i + 6, j : j + 6]).tobytes() for i in range(5) for j in range(5)}


def test_augment_colour_stays_in_range():
    image = random_pixels(8, 8)
    got = [augment(image, AugmentConfig(colour=0.2), np.random.default_rng(seed)) for seed in range(20)]
    change = [float(one.mean()) / float(image.mean()) for one in got]
    assert 0.75 < min(change) < 0.95 and 1.05 < max(change) < 1.25
    assert augment(image, AugmentConfig(), np.random.default_rng(0)) is image
