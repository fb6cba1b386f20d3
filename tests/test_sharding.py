import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.tiny import mesh_of, random_batch, tiny_model
from vlm_jax.config import MeshConfig
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.stack import stacked
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import (
    RULES,
    Named,
    batch_sharding,
    constrain,
    initial_params,
    make_mesh,
    place,
    place_tree,
    shardings_of,
)

is_box = lambda x: isinstance(x, Named)


def test_the_mesh_takes_what_is_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(data=1, fsdp=2, tensor=-1)).shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (2, 2, 1)])
def test_sizes_that_do_not_fit_say_what_to_change(sizes):
    with pytest.raises(ValueError, match=r"there are 8: change --config\.mesh\.data"):
        make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_impossible_sizes_are_an_error(sizes):
    with pytest.raises(ValueError, match="sizes are positive, and at most one is -1"):
        make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


def test_names_become_mesh_axes():
    mesh = mesh_of(2, 2, 2)
    placed = lambda names, shape: place(names, shape, mesh).spec
    assert placed(("layers", "embed", "heads", "head"), (3, 8, 4, 5)) == PartitionSpec(None, "fsdp", "tensor", None)
    assert placed(("vocab", "embed"), (8, 8)) == PartitionSpec("tensor", "fsdp")
    assert placed(("batch", "length", None), (8, 3, 3)) == PartitionSpec(("data", "fsdp"), None, None)
    assert placed((), ()) == PartitionSpec()
    # A mesh axis of size 1 is left out.
    assert place(("batch", "embed"), (8, 8), mesh_of(4, 1, 2)).spec == PartitionSpec("data", None)


def test_what_does_not_divide_is_replicated_and_said():
    mesh = mesh_of(2, 2, 2)
    placement = place(("embed", "kv_heads", "head"), (8, 3, 5), mesh)
    assert placement.spec == PartitionSpec("fsdp", None, None)
    assert placement.replicated == ("kv_heads=3 is not divisible by tensor=2",)
    assert place(("batch",), (6,), mesh).replicated == ("batch=6 is not divisible by data*fsdp=4",)
    assert place(("embed", "kv_heads"), (8, 4), mesh).replicated == ()


def test_unknown_names_and_wrong_ranks_are_errors():
    mesh = mesh_of(1, 1, 1)
    with pytest.raises(ValueError, match=r"unknown logical axis 'embedding'.*'embed'"):
        place(("embedding",), (8,), mesh)
    with pytest.raises(ValueError, match=r"'embed'.*do not fit shape \(8, 8\)"):
        place(("embed",), (8, 8), mesh)


def test_every_parameter_of_a_model_is_named_and_stacked_layers_get_one_name_more():
    boxed = jax.eval_shape(VisionLanguageModel(tiny_model()).init, jax.random.key(0), random_batch(1))["params"]
    for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        assert is_box(box) and len(box.names) == box.value.ndim, path
        assert set(box.names) <= RULES.keys(), path
        # The pattern of the parts that are stacks of layers.
        assert ("layers" in box.names) == any(key.key == "layers" for key in path), path
    query = boxed["language"]["layers"]["attention"]["query"]["kernel"]
    assert query.names == ("layers", "embed", "heads", "head") and query.value.shape == (3, 32, 8, 4)
    gate = boxed["fusion"]["layers"]["attention_gate"]
    assert gate.names == ("layers",) and gate.value.shape == (2,)


def test_a_tree_of_boxes_becomes_a_tree_of_shardings():
    mesh = mesh_of(2, 2, 2)
    boxed = jax.eval_shape(VisionLanguageModel(tiny_model()).init, jax.random.key(0), random_batch(1))["params"]
    shardings = shardings_of(place_tree(boxed, mesh), mesh)
    up = shardings["language"]["layers"]["mlp"]["up"]["kernel"]
    assert up.spec == PartitionSpec(None, "fsdp", "tensor")
    assert up.shard_shape((3, 32, 48)) == (3, 16, 24)
    assert jax.tree.structure(shardings) == jax.tree.structure(jax.tree.map(Named.unbox, boxed, is_leaf=is_box))


def test_plain_leaves_are_replicated():
    mesh = mesh_of(2, 2, 2)
    assert place_tree({"step": jnp.zeros((4, 4))}, mesh)["step"].spec == PartitionSpec(None, None)


def test_named_boxes_move_their_names():
    box = Named(jnp.zeros((2, 3)), ("embed", "mlp"))
    more = box.add_axis(0, {"partition_name": "layers"})
    assert more.names == ("layers", "embed", "mlp")
    assert more.remove_axis(0, {}).names == box.names
    assert box.replace_boxed(jnp.ones(())).names == box.names
    assert jax.tree.leaves(box) == [box.value]


def test_constrain_lays_activations_on_the_mesh_of_the_context():
    x = np.zeros((8, 3, 4), np.float32)
    shift = lambda: jax.jit(lambda x: constrain(x + 1, "batch", "length", "heads"))
    np.testing.assert_array_equal(shift()(x), x + 1)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        y = shift()(x)
        assert y.sharding.shard_shape(y.shape) == (2, 3, 2)
        with pytest.raises(ValueError, match="unknown logical axis 'rows'"):
            jax.jit(lambda x: constrain(x, "rows", None, None))(x)
    rows = jax.device_put(x, batch_sharding(mesh_of(2, 2, 2)))
    assert rows.sharding.shard_shape(rows.shape) == (2, 3, 4)


class Layers(nn.Module):
    """Two layers of a kernel and a bias."""

    def setup(self):
        linear = Linear({"embed": 8}, {"mlp": 16}, bias=True, dtype=jnp.float32)
        self.layers = stacked(self, "layers", linear, 2, jnp.zeros((1, 8)))

    def __call__(self, x):
        return x

    def example(self):
        return (jnp.zeros(1),)


def test_initial_parameters_depend_on_their_path_alone():
    key, path = jax.random.key(3), "layers/kernel"
    made = {sizes: initial_params(Layers(), key, mesh=mesh_of(*sizes)) for sizes in ((1, 1, 1), (2, 2, 2))}
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, made.values()))
    one, many = made.values()
    assert many[path].sharding.shard_shape((2, 8, 16)) == (2, 4, 8)
    assert one[path].std() == pytest.approx(8**-0.5, rel=0.2) and (one[path][0] != one[path][1]).all()
    assert not one["layers/bias"].any()
    left = initial_params(Layers(), key, mesh=mesh_of(1, 1, 1), without={"layers/bias"})
    assert left.keys() == {path}
    np.testing.assert_array_equal(left[path], one[path])
