"""The conversion engine: every name that does not fit is told, all of them at once."""

import jax
import numpy as np
import pytest

from vlm_jax.interop.engine import to_ours, to_published
from vlm_jax.interop.plan import ConversionError
from vlm_jax.interop.table import Copy, Empty, Table, published_name, row

TABLE = Table(
    (
        row("embed", "embedding", "V D -> V D"),
        row("[model.]layers.{}.qkv", ("layers/q", "layers/k"), "(N J H) D -> D N H"),
        row("layers.{}.gate", "layers/gate", "() ->"),
        row(("table.a", "table.b"), "table", "T D -> D T", split=(2, 1)),
        row("patch", "patch", "D C Y X -> (Y X C) D", C=3, Y=2, X=2),
    ),
    copies=(Copy("head", of="embed"),),
    ignored=("layers.{}.buffer",),
)
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
    {
        "embedding": (5, 4),
        "layers": {"q": (2, 4, 3, 2), "k": (2, 4, 3, 2), "gate": (2,)},
        "table": (4, 3),
        "patch": (12, 4),
    },
    is_leaf=lambda x: isinstance(x, tuple),
)


def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, 4), "table.a": (2, 4), "table.b": (1, 4), "patch": (4, 3, 2, 2)}
    shapes |= {f"layers.{i}.qkv": (12, 4) for i in range(2)} | {f"layers.{i}.gate": (1,) for i in range(2)}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def test_values_go_where_the_axes_say():
    published = state()
    ours = to_ours(published, TABLE, ABSTRACT)
    # In the fused matrix each head has its query's two rows and its key's two.
    np.testing.assert_array_equal(ours["layers"]["q"][1, :, 2, 1], published["layers.1.qkv"][9])
    np.testing.assert_array_equal(ours["layers"]["k"][0, :, 2, 1], published["layers.0.qkv"][11])
    np.testing.assert_array_equal(ours["layers"]["gate"], [published[f"layers.{i}.gate"][0] for i in range(2)])
    np.testing.assert_array_equal(ours["table"][:, 2], published["table.b"][0])
    # Row 1, column 0, colour 2 of a patch.
    np.testing.assert_array_equal(ours["patch"][(1 * 2 + 0) * 3 + 2], published["patch"][:, 2, 1, 0])


def test_round_trip():
    published = state()
    back = to_published(to_ours(published, TABLE, ABSTRACT), TABLE)
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_optional_parts_ignored_names_and_equal_copies():
    published = state()
    published["model.layers.1.qkv"] = published.pop("layers.1.qkv")
    published |= {"layers.0.buffer": np.zeros(3), "head": published["embed"].copy()}
    back = to_published(to_ours(published, TABLE, ABSTRACT), TABLE)
    np.testing.assert_array_equal(back["layers.1.qkv"], published["model.layers.1.qkv"])
    assert not {"head", "layers.0.buffer"} & back.keys()


def test_a_tensor_without_numbers_is_written_and_may_be_missing():
    table = TABLE.under("[model.]") + Table((), empty=(Empty("none", (1, 0, 4)),)).under("part.")
    for published in (state(), state() | {"part.none": np.zeros((1, 0, 4), np.float32)}):
        back = to_published(to_ours(published, table, ABSTRACT), table)
        assert back["part.none"].shape == (1, 0, 4) and back["part.none"].dtype == np.float32
    with pytest.raises(ConversionError, match=r"(?s)wrong shapes.*part\.none: found \(1, 4\), expected \(1, 0, 4\)"):
        to_ours(state() | {"part.none": np.zeros((1, 4), np.float32)}, table, ABSTRACT)


def test_the_type_is_kept():
    half = {name: tensor.astype(np.float16) for name, tensor in state().items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(to_ours(half, TABLE, ABSTRACT))} == {np.dtype(np.float16)}


def test_everything_wrong_is_in_one_error():
    published = state()
    del published["layers.1.gate"]
    published["model.layers.0.qkv"] = published["layers.0.qkv"]
    published["layers.2.qkv"] = published["layers.0.qkv"]
    published["table.b"] = np.zeros((2, 4))
    published["surplus"] = np.zeros((1, 2))
    published["head"] = published["embed"] + 1
    with pytest.raises(ConversionError) as error:
        to_ours(published, TABLE, ABSTRACT | {"unknown": ABSTRACT["table"]})
    message = str(error.value)
    for line in (
        "no row of the table knows; add a row, or an `ignored` one (1):\n    surplus (1, 2)",
        "matched more than once; leave one out (1):\n    layers.0.qkv and model.layers.0.qkv",
        "the weights do not have (1):\n    layers.1.gate (for layers/gate)",
        "the model does not have; check the number of layers in its config (1):\n    layers.2.qkv: the model has 2 layers",
        "wrong shapes; check the widths in the model's config (1):\n    table.b: found (2, 4), expected (1, 4)",
        "not equal to their original; set tied_head=False in the model's config (1):\n    head and embed",
        "no row of the table makes; use the table of this model's config (1):\n    unknown",
    ):
        assert line in message, message


def test_a_row_too_many_and_a_parameter_twice():
    extra = Table((row("embed2", "embedding", "V D -> V D"), row("other", "other", "D -> D")))
    with pytest.raises(ConversionError, match=r"(?s)\n    other\n.*our embedding, by 2 rows"):
        to_ours(state(), TABLE + extra, ABSTRACT)
    with pytest.raises(ConversionError, match=r"(?s)\n    other\n.*our embedding, by 2 rows"):
        to_published(to_ours(state(), TABLE, ABSTRACT), TABLE + extra)


def test_a_name_that_is_both_a_parameter_and_ignored():
    with pytest.raises(ConversionError, match=r"matched more than once.*\n    embed \(5, 4\)"):
        to_ours(state(), TABLE + Table((), ignored=("embed",)), ABSTRACT)


def test_our_shape_must_be_what_the_row_says():
    with pytest.raises(ConversionError, match=r"patch: our shape \(13, 4\) is not \(Y X C\) D with"):
        to_ours(state(), TABLE, ABSTRACT | {"patch": jax.ShapeDtypeStruct((13, 4), np.float32)})


def test_a_part_inside_a_larger_model():
    inside = TABLE.under("model.", "language/")
    published = {f"model.{name}": tensor for name, tensor in state().items()}
    ours = to_ours(published, inside, {"language": ABSTRACT})
    assert list(ours) == ["language"]
    assert to_published(ours, inside).keys() == published.keys()


def test_a_copy_is_compared_under_an_optional_prefix_too():
    published = {f"model.{name}": tensor for name, tensor in state().items()} | {"head": state()["embed"] + 1}
    with pytest.raises(ConversionError, match=r"not equal to their original.*\n    head and model\.embed"):
        to_ours(published, TABLE.under("[model.]"), ABSTRACT)


def test_written_names():
    assert published_name("[model.]layers.{}.qkv", (7,)) == "layers.7.qkv"
