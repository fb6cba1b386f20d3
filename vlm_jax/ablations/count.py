"""Parameters of a run's model, from shapes alone."""

from __future__ import annotations

import math

from vlm_jax.config import RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.paths import by_path
from vlm_jax.sharding import boxed_params
from vlm_jax.training.adapters import adapter_boxes
from vlm_jax.training.params import resolve


def parameters(run: RunConfig) -> tuple[int, int]:
    """All of a run's parameters, its adapters among them, and those it trains; of `rows_from` the rows that it trains."""
    model = module_of(run.model)(run.model)
    boxes = by_path(boxed_params(model))
    boxes |= adapter_boxes(boxes, run.adapters)
    rules = resolve(list(boxes), run.optimizer.rules)
    total = trained = 0
    for path, box in boxes.items():
        shape, rule = box.value.shape, rules[path]
        size = math.prod(shape)
        total += size
        trained += 0 if rule.frozen else size * (shape[0] - rule.rows_from) // shape[0] if rule.rows_from else size
    return total, trained
