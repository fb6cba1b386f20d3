"""Einsum strings and shape comments keep to the legend of `vlm_jax/layers/__init__.py`."""

import re
from pathlib import Path

import pytest

import vlm_jax.layers

ROOT = Path(vlm_jax.layers.__file__).parents[1]
LEGEND = [line for line in vlm_jax.layers.__doc__.splitlines() if line.startswith("    ")]
LETTERS = set(re.findall(r"\b[A-Z]\b", " ".join(LEGEND)))
ROOMS = ("ops", "layers", "models", "generation", "processing", "data", "training")


def test_the_legend_is_read():
    assert {*"BMIPRTSDOFELVNKGHQZU"} == LETTERS


@pytest.mark.parametrize("path", [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))], ids=lambda p: p.stem)
def test_only_letters_of_the_legend(path):
    text = path.read_text()
    shapes = re.findall(r"\[([A-Za-z0-9 ,.*+/()-]+)\]", text)
    named = {letter for shape in shapes for letter in re.findall(r"\b[A-Z]\b", shape) if "," in shape or len(shape) == 1}
    einsums = re.findall(r'"([A-Za-z.]+(?:,[A-Za-z.]+)*->[A-Za-z.]*)"', text)
    summed = {letter for einsum in einsums for letter in re.sub(r"[^A-Za-z]", "", einsum)}
    local = {"patches": set("rchwdtks")}.get(path.stem, set())  # rows and columns before and after, and taps
    assert not (named | summed) - LETTERS - local
