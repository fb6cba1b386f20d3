import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params, tiny_model
from vlm_jax.layers.block import Block
from vlm_jax.layers.decoder import Decoder
from vlm_jax.layers.gated_cross_attention import GatedCrossAttention, GatedCrossAttentionBlock
from vlm_jax.layers.linear import Norm
from vlm_jax.layers.stack import LanguageInputs
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import Mask, causal_mask, media_mask
from vlm_jax.ops.rotary import rotary_angles, rotate

B, T, M, R, D, V = 2, 8, 2, 3, 32, 16  # V: width of the visual tokens
LAST = np.repeat([[0, 0, 1, 1, 1, 2, 2, 2]], B, axis=0)
FIRST = np.ones_like(LAST)
MODES = ["last", "all_previous"]
CONFIG = dataclasses.replace(tiny_model().fusion, every=1)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, D)).astype(np.float32)
VISUAL = RNG.standard_normal((B, M, R, V)).astype(np.float32)


def mask_of(mode):
    return media_mask(FIRST, LAST, M, mode, tokens=R)


@functools.cache
def block(**changes):
    """One gated layer as a function of (params, x, mask, visual tokens), and random parameters."""
    module = GatedCrossAttentionBlock(dataclasses.replace(CONFIG, **changes), D, V, jnp.float32)

    def apply(params, x, mask, visual):
        return module.apply({"params": params}, x, mask, visual.reshape(B, M * R, V))

    params = random_params(module, X, mask_of("last"), VISUAL.reshape(B, M * R, V))
    return jax.jit(apply), params


@pytest.mark.parametrize("mode", MODES)
def test_a_token_before_any_image_gets_nothing_but_the_feed_forward(mode):
    apply, params = block()
    seen = mask_of(mode)
    moved = apply(params | {"mlp_gate": np.float32(0)}, X, seen, VISUAL) - X
    np.testing.assert_array_equal(np.any(moved, axis=(0, 2)), LAST[0] > 0)
    moved = apply(params | {"attention_gate": np.float32(0)}, X, seen, VISUAL) - X
    assert np.all(np.abs(moved).max(-1) > 1e-2)
    both = apply(params, X, seen, VISUAL)
    np.testing.assert_array_equal(both[:, :2] - X[:, :2], moved[:, :2])


@pytest.mark.parametrize("mode", MODES)
def test_a_token_depends_on_the_images_it_sees_and_on_no_other(mode):
    apply, params = block()
    seen = mask_of(mode)
    expected = apply(params, X, seen, VISUAL)
    for slot in range(M):
        changed = VISUAL.copy()
        changed[:, slot] += 1e3
        moved = np.any(apply(params, X, seen, changed) != expected, axis=-1)
        np.testing.assert_array_equal(moved, seen.dense()[..., slot * R])


def test_gradients_are_finite_when_nothing_is_seen():
    apply, params = block()
    loss = jax.jit(jax.grad(lambda *inputs: 1e3 * jnp.sum(apply(*inputs) ** 2), argnums=(0, 1, 3)))
    seen = Mask.from_keys(np.zeros((1, M * R), bool))
    of_params, of_x, of_visual = loss(params, X, seen, VISUAL)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_params, of_x)))
    assert not np.asarray(of_visual).any() and np.asarray(of_x).any()
    assert float(of_params["attention_gate"]) == 0 != float(of_params["mlp_gate"])


def test_the_block_by_hand():
    apply, params = block()
    norm = lambda x, p: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
    seen = mask_of("last")
    attention = params["attention"]
    q = np.einsum("BTD,DNH->BTNH", norm(X, params["attention_norm"]), attention["query"]["kernel"])
    flat = VISUAL.reshape(B, M * R, V)
    k, v = (np.einsum("BSV,VNH->BSNH", flat, attention[name]["kernel"]) for name in ("key", "value"))
    y = attend(*(jnp.asarray(part) for part in (q, k, v)), seen)
    x = X + np.tanh(params["attention_gate"]) * np.einsum("BTNH,NHD->BTD", y, attention["out"]["kernel"])
    hidden = np.maximum(norm(x, params["mlp_norm"]) @ params["mlp"]["up"]["kernel"], 0) ** 2
    x = x + np.tanh(params["mlp_gate"]) * (hidden @ params["mlp"]["down"]["kernel"])
    np.testing.assert_allclose(apply(params, X, seen, VISUAL), x, atol=2e-4)


def test_without_gates_and_without_a_feed_forward():
    """Flamingo's table 3, iii and iv: as with gates of 1, and as with a feed-forward that adds nothing."""
    seen = mask_of("last")
    apply, params = block()
    open_gate = np.float32(30)  # tanh of it is 1
    plain, ungated = block(gating="none")
    assert params.keys() - ungated.keys() == {"attention_gate", "mlp_gate"}
    same = {name: params[name] for name in ungated}
    expected = apply(params | {"attention_gate": open_gate, "mlp_gate": open_gate}, X, seen, VISUAL)
    np.testing.assert_allclose(plain(same, X, seen, VISUAL), expected, atol=1e-5)
    vanilla, short = block(mlp_width=0)
    assert params.keys() - short.keys() == {"mlp", "mlp_norm", "mlp_gate"}
    expected = apply(params | {"mlp_gate": np.float32(0)}, X, seen, VISUAL)
    np.testing.assert_allclose(vanilla({name: params[name] for name in short}, X, seen, VISUAL), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Placements
# ---------------------------------------------------------------------------------------------------------------------

PLACEMENTS = {  # (every, offset, layers, start, place): the language layers that have a gated layer
    (1, 0, 3, 0, "before"): [0, 1, 2],
    (2, 0, 5, 0, "before"): [0, 2, 4],
    (2, 1, 5, 0, "before"): [1, 3],
    (4, 3, 5, 0, "before"): [3],
    (4, 1, 6, 0, "before"): [1, 5],
    (3, 2, 8, 0, "before"): [2, 5],
    (5, 2, 5, 0, "before"): [2],
    (7, 5, 6, 0, "before"): [5],
    (2, 1, 8, 3, "before"): [4, 6],
    (1, 0, 3, 0, "within"): [0, 1, 2],
    (3, 1, 8, 2, "within"): [3, 6],
}
POSITIONS = np.repeat(np.arange(T)[None], B, axis=0)
SEGMENTS = np.ones_like(POSITIONS)


@functools.cache
def plain_layer():
    """One language layer, written out: (x, params, what stands between its halves) -> x."""
    language = tiny_model().language
    module = Block(language.block, jnp.float32)
    mask = causal_mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
    angles = rotary_angles(language.positions, language.block.head_width, jnp.asarray(POSITIONS))
    attention = lambda q, k, v: (attend(rotate(q, *angles), rotate(k, *angles), v, mask), None)
    half = jax.jit(lambda x, params: module.apply({"params": params}, x, attention)[0])

    def without(params, part, name):
        """Of a layer that adds nothing in one of its halves, the other."""
        return params | {part: params[part] | {name: jax.tree.map(np.zeros_like, params[part][name])}}

    def layer(x, params, between=lambda x: x):
        attended = half(x, without(params, "mlp", "down"))
        return half(between(attended), without(params, "attention", "out"))

    return layer


@functools.cache
def params_of(layers, gated):
    """Random parameters of a language model and of the gated layers in it."""
    decoder = Decoder(dataclasses.replace(tiny_model().language, layers=8), jnp.float32)
    language = random_params(decoder, LanguageInputs(X), POSITIONS, SEGMENTS)
    language["layers"] = jax.tree.map(lambda p: p[:layers], language["layers"])
    rng = np.random.default_rng(1)
    several = lambda p: np.stack([p * rng.uniform(0.5, 1.5, p.shape).astype(np.float32) for _ in range(gated)])
    return language, {"layers": jax.tree.map(several, block()[1])}


def parts(every, offset, layers, start=0, place="before"):
    language = dataclasses.replace(tiny_model().language, layers=layers)
    config = dataclasses.replace(CONFIG, every=every, offset=offset, start=start, place=place)
    return Decoder(language, jnp.float32), GatedCrossAttention(config, language, V, jnp.float32)


def run(placement, language_params, gated_params, from_memory=False):
    """Hidden states and where the tokens looked."""
    decoder, fusion = parts(*placement)

    @jax.jit
    def forward(language_params, gated_params):
        fuse = functools.partial(fusion.apply, {"params": gated_params})
        images = {"media_cache": fuse(VISUAL, method="media_cache")} if from_memory else {"visual": VISUAL}
        interleaved = fuse(FIRST, LAST, return_attention=True, method="interleaved", **images)
        out = decoder.apply({"params": language_params}, LanguageInputs(X, interleaved), POSITIONS, SEGMENTS)
        return out.hidden, out.interleaved

    return forward(language_params, gated_params)


one_of = lambda tree, index: jax.tree.map(lambda p: p[index], tree)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_placements_equal_a_plain_loop(placement):
    places = PLACEMENTS[placement]
    language, gated = params_of(placement[2], len(places))
    x, weights = run(placement, language, gated)
    apply, _ = block()
    expected, seen = X, mask_of("last")
    for index in range(placement[2]):
        gate = lambda x: x
        if index in places:
            gate = functools.partial(apply, one_of(gated["layers"], places.index(index)), mask=seen, visual=VISUAL)
        if placement[-1] == "within":
            expected = plain_layer()(expected, one_of(language["layers"], index), gate)
        else:
            expected = plain_layer()(gate(expected), one_of(language["layers"], index))
    norm = Norm(tiny_model().language.block.norm, D, jnp.float32)
    expected = norm.apply({"params": language["final_norm"]}, expected)
    np.testing.assert_allclose(x, expected, atol=2e-4)
    assert weights.shape == (len(places), B, T, M * R)


@pytest.mark.parametrize("placement", [(4, 1, 6), (4, 1, 6, 0, "within"), (3, 2, 6, 0, "before")], ids=str)
def test_layers_one_by_one_and_keys_made_before_give_the_same(placement):
    language, gated = params_of(6, 2)
    unstacked = lambda tree, count: tree | {"layers": tuple(one_of(tree["layers"], index) for index in range(count))}
    expected = run(placement, language, gated)
    for params in ((language, gated), (unstacked(language, 6), unstacked(gated, 2))):
        for ours, value in zip(run(placement, *params, from_memory=True), expected, strict=True):
            np.testing.assert_allclose(ours, value, atol=1e-4)


@pytest.mark.parametrize(("every", "offset"), [(2, 2), (2, -1), (4, 3)])
def test_an_impossible_placement_is_an_error(every, offset):
    _, fusion = parts(every, offset, 3)
    with pytest.raises(ValueError, match=rf"every {every}th layer from 0 \+ {offset}: the offset must be below"):
        fusion.init(jax.random.key(0), FIRST, LAST, visual=VISUAL, method="interleaved")
