import dataclasses

import jax.numpy as jnp
import numpy as np
import torch

from tests.tiny import VOCAB, random_batch
from vlm_jax.training.losses import means, next_token_sums

BATCH = random_batch()
LOGITS = jnp.asarray(np.random.default_rng(1).normal(size=(*BATCH.tokens.shape, VOCAB)), jnp.float32)


def test_loss_equals_torch_cross_entropy_over_the_weighted_tokens():
    logits, targets = torch.tensor(np.asarray(LOGITS)), torch.tensor(BATCH.targets).long()
    targets[torch.tensor(BATCH.weights) == 0] = -100
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)).item()
    np.testing.assert_allclose(means(next_token_sums(LOGITS, BATCH))["loss"], expected, rtol=1e-6)


def test_a_batch_with_nothing_to_learn_from_gives_zero():
    nothing = dataclasses.replace(BATCH, weights=np.zeros_like(BATCH.weights))
    result = means(next_token_sums(LOGITS, nothing))
    assert all(float(value) == 0 for value in result.values())


def test_a_sequence_is_right_only_if_each_of_its_learned_tokens_is():
    targets = np.asarray(jnp.argmax(LOGITS, axis=-1)).astype(np.int32)
    weights = np.zeros_like(BATCH.weights)
    weights[0, [3, 4, 8, 9]] = 1  # both segments of the first row
    weights[1, [4, 9]] = 1
    targets[0, 9] += 1  # one wrong token in segment 2 of row 0
    targets[1, 2] += 1  # wrong, but nobody asked
    sums = next_token_sums(LOGITS, dataclasses.replace(BATCH, targets=targets, weights=weights))
    assert (float(sums["sequences"]), float(sums["right"]), float(sums["tokens_right"])) == (4, 3, 5)
