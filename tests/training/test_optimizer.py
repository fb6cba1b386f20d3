import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from vlm_jax.config import OptimizerConfig, ParamRule
from vlm_jax.training.optimizer import make_optimizer, schedule


def test_schedule_warms_up_linearly_and_ends_where_it_should():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr=0.1)
    rate = schedule(config, 24)
    np.testing.assert_allclose([rate(i) for i in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(14), 0.55, rtol=1e-6)  # half way between 1 and 0.1
    np.testing.assert_allclose(rate(24), 0.1, rtol=1e-6)
    constant = schedule(OptimizerConfig(lr=2.0, warmup_steps=0, schedule="constant"), 10)
    assert constant(0) == constant(9) == 2.0
    wsd = schedule(OptimizerConfig(lr=2.0, warmup_steps=2, schedule="wsd", decay_steps=4, final_lr=0.5), 12)
    assert [float(wsd(step)) for step in (0, 1, 2, 7, 8, 10, 12)] == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0])
    for wrong in (dict(schedule="wsd"), dict(schedule="wsd", decay_steps=11), dict(schedule="linear", decay_steps=1)):
        with pytest.raises(ValueError, match=r"config\.optimizer\.decay_steps=\d+ of schedule='\w+': expected 1 to 10 of wsd"):
            schedule(OptimizerConfig(lr=1.0, warmup_steps=2, **wrong), 12)
    linear = schedule(OptimizerConfig(lr=1.0, warmup_steps=0, schedule="linear"), 10)
    np.testing.assert_allclose(linear(5), 0.5, rtol=1e-6)


def test_updates_equal_torch_adamw_with_clipping_and_a_rate_and_decay_for_each_path():
    config = OptimizerConfig(lr=0.01, warmup_steps=0, schedule="constant", b2=0.98, weight_decay=0.2, clip_norm=1.0)
    rules = {"a": ParamRule(pattern="a", lr=0.5), "b": ParamRule(pattern="b", decay=0.0)}
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in rules}
    ours = jax.tree.map(jnp.asarray, start)
    optimizer = make_optimizer(config, rules, 100)
    state = optimizer.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [
        {"params": [theirs["a"]], "lr": 0.005, "weight_decay": 0.2},
        {"params": [theirs["b"]], "lr": 0.01, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    for scale in (0.01, 5.0, 0.3):  # below and above the clipping norm
        gradient = {name: (scale * rng.normal(size=(3, 4))).astype(np.float32) for name in rules}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        reference.step()
    for name in rules:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), atol=2e-6)


def test_old_rows_of_an_embedding_do_not_move_and_do_not_count_in_the_norm():
    config = OptimizerConfig(lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=1.0)
    rules = {"e": ParamRule(pattern="e", rows_from=2), "k": ParamRule(pattern="k")}
    params = {"e": jnp.ones((3, 2)), "k": jnp.ones((2,))}
    gradient = {"e": jnp.full((3, 2), 1e6).at[2].set(0.1), "k": jnp.full((2,), 0.1)}
    optimizer = make_optimizer(config, rules, 10)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["e"][:2], 0)
    assert np.all(np.asarray(updates["e"][2]) < 0)
    # The huge gradient of the old rows would have scaled this moment to nothing.
    np.testing.assert_allclose(state[2].mu["k"], 0.01, rtol=1e-5)
