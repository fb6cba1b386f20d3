"""Families that encode and do not answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, VitConfig
from vlm_jax.interop.published import Family
from vlm_jax.interop.table import Table
from vlm_jax.processing.encoders import EncoderProcessor


def dual(
    config_from_hf: Callable[[Any], DualEncoderConfig],
    table: Callable[[DualEncoderConfig], Table],
    *other_tables: Callable[[DualEncoderConfig], Table],
) -> Family:
    """An image encoder and a text encoder."""
    processor = lambda config, hf, wrapped: EncoderProcessor(wrapped, config.text.encoder.max_positions)
    return Family(config_from_hf, lambda config, hf: table(config), processor, other_tables)


def image_tower(
    config_from_hf: Callable[[Any], ImageTowerConfig],
    table: Callable[[ImageTowerConfig], Table],
    *other_tables: Callable[[ImageTowerConfig], Table],
) -> Family:
    """An image encoder alone."""
    processor = lambda config, hf, wrapped: EncoderProcessor(wrapped)
    return Family(config_from_hf, lambda config, hf: table(config), processor, other_tables)


def first_token(config_from_hf: Callable[[Any], VitConfig], *tables: Callable[[VitConfig], Table]) -> Family:
    """An image encoder whose class token stands for the image.

    Args:
      tables: of the encoder; the first is written.
    """
    under = lambda table: lambda config: table(config.encoder).under(ours="encoder/")
    tower = lambda hf: ImageTowerConfig(encoder=config_from_hf(hf), pool="class_token")
    return image_tower(tower, *map(under, tables))
