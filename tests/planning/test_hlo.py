"""What is read from the text of a compiled program, against programs whose work is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import mesh_of
from vlm_jax.planning import hlo
from vlm_jax.planning.hlo import Program

LAYERS, ROWS, WIDTH = 5, 8, 16


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(2, 2, 2)


def compiled(fn, *args):
    return Program(jax.jit(fn).lower(*args).compile().as_text())


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    """A sum over `fsdp` five times, and what `data` and `tensor` hold joined once."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "tensor")), out_specs=P(), check_vma=False)
    def work(x):
        x = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None), x, length=LAYERS)[0]
        return jax.lax.all_gather(x, ("data", "tensor"), tiled=True)

    found = {(one.kind, one.axes): one for one in compiled(work, jnp.ones((ROWS, WIDTH))).collectives(mesh)}
    share = ROWS // 4 * WIDTH * 4  # bytes of a device's part
    assert found.keys() == {("all-reduce", "fsdp"), ("all-gather", "data*tensor")}
    summed, joined = found["all-reduce", "fsdp"], found["all-gather", "data*tensor"]
    assert (summed.count, summed.bytes) == (LAYERS, LAYERS * 2 * share / 2)
    assert (joined.count, joined.bytes) == (1, 3 * share)


def test_a_permutation_is_of_the_axis_it_goes_along(mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
    def work(x):
        return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

    (one,) = compiled(work, jnp.ones((ROWS, WIDTH))).collectives(mesh)
    assert (one.kind, one.axes, one.bytes) == ("collective-permute", "tensor", ROWS // 2 * WIDTH * 4)


def test_memory_counts_loops_and_not_what_is_fused():
    """Twelve numbers written and read in each of five steps; the sine and the sum between them stay in registers."""
    size = 1 << 16

    def work(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) + jnp.cos(x) * 2, None), x, length=LAYERS)[0]

    found = compiled(work, jnp.ones(size)).memory_bytes()
    assert LAYERS * 2 * size * 4 <= found <= (LAYERS + 2) * 2 * size * 4


def test_a_slice_of_a_stack_is_not_the_stack():
    """A loop over layers reads each layer once, and writes what it keeps once."""
    stack = jnp.ones((64, 1 << 12))

    def work(stack, x):
        return jax.lax.scan(lambda x, layer: (x * layer, x + layer), x, stack)

    found = compiled(work, stack, stack[0]).memory_bytes()
    # The layer read twice, the state written and read, what is kept written; and the stack of it filled with zeros before.
    assert 4 * stack.nbytes < found < 10 * stack.nbytes, "and not 64 times all of it"


def test_a_loop_of_unknown_length_is_told():
    def work(x):
        return jax.lax.while_loop(lambda x: x[0] < 10, lambda x: x * 2, x)

    assert compiled(work, jnp.ones(8)).unknown_loops == 1
    assert compiled(jnp.sin, jnp.ones(8)).unknown_loops == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_0'}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, metadata={}", [[0, 1], [1, 0]]),
        ("metadata={}", [[0, 1, 2, 3]]),
    ],
)
def test_every_spelling_of_groups(text, groups):
    """As CPUs, GPUs and TPUs have them."""
    assert hlo._groups(text, 4) == groups


LOOP = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%p.1), index=1
  %y = f32[8]{0:T(128)} sine(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i.1, %y)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%a), condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_for_tpus_is_counted_by_its_condition():
    program = Program(LOOP)
    assert (program.runs["body"], program.unknown_loops, hlo.estimated_cycles(program)) == (7, 0, 70.0)
