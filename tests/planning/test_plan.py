"""Plans against programs that run here, and for TPUs that are not here."""

import dataclasses
import io

import jax
import pytest
from rich.console import Console

from tests.tiny import text_run, thorough, tiny_run
from vlm_jax.config import MeshConfig
from vlm_jax.plan import candidates, plan
from vlm_jax.planning import programs
from vlm_jax.planning.hardware import CHIPS, parse_topology
from vlm_jax.planning.report import advice, device_hours, figures, print_plan
from vlm_jax.sharding import make_mesh

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def update():
    """The plan of an update, on a mesh of eight."""
    run = text_run(mesh=MESH)
    return run, programs.training(run, make_mesh(MESH, jax.devices()))


def test_what_an_update_is_given_is_known_by_kind(update):
    _, planned = update
    memory = planned.compiled.memory_analysis()
    assert set(planned.arguments) == {"trained parameters", "optimizer", "batch"}
    kept = planned.arguments["trained parameters"] + planned.arguments["optimizer"]
    # Of a batch, the program is given what a language model alone reads.
    assert kept < memory.argument_size_in_bytes < kept + planned.arguments["batch"]
    # Two moments, and the counters of updates and of skipped ones.
    assert planned.arguments["optimizer"] == pytest.approx(2 * planned.arguments["trained parameters"], abs=64)
    assert planned.temporary >= memory.temp_size_in_bytes > 0 and planned.parameters == planned.trained == 33_504


def test_a_gpu_has_the_figures_of_its_data_sheet(update, capsys):
    run, planned = update
    target = parse_topology("h100:8")
    found = figures(planned, dataclasses.replace(target, chip=CHIPS["h100"]))
    assert found["fits"] and found["device"] == "NVIDIA H100 SXM"
    assert found["seconds"]["compute"] == planned.model_flops / 8 / 989e12
    assert found["seconds"]["memory"] == found["memory_bytes"] / 3350e9
    assert found["step_seconds"] == max(found["seconds"].values()) and 0 < found["mfu"] <= 1
    assert device_hours(found, 1e9) == pytest.approx(1e9 / found["tokens_per_second"] * 8 / 3600)
    small = figures(planned, dataclasses.replace(target, chip=dataclasses.replace(CHIPS["h100"], memory=1e4)))
    assert not small["fits"] and any("--config.remat=full" in line for line in advice(small, run))
    console = Console(file=io.StringIO(), width=120)
    print_plan(small, run, tokens=1e9, console=console)
    shown = console.file.getvalue()
    assert "does not fit" in shown and "predicted MFU" in shown and "device-hours for 1 Gtokens" in shown


def test_prefill_and_decoding():
    """The cache is what a step is given beside the parameters; a step's FLOPs are those of one token a row."""
    prefill, decode = plan(text_run(mesh=MESH), "cpu:8", generate=(8, 32), new=32)
    assert (prefill["program"], decode["program"]) == ("prefill", "decode")
    assert (prefill["tokens"], decode["tokens"]) == (256, 8)
    assert prefill["bytes"]["parameters"] == decode["bytes"]["parameters"] > 0
    # Keys and values of three layers, two of four heads of 4, 256 slots of two rows; and what rows want.
    cache = 2 * 3 * 2 * 4 * 256 * 2 * 4
    assert cache < decode["bytes"]["cache"] < 1.1 * cache
    assert 0 < decode["model_flops"] < prefill["model_flops"] / 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4", "expected a TPU and its shape"),
        ("cpu", "expected a TPU and its shape"),
        ("gpu:8:memory=80e9", "bandwidth, flops, link missing"),
        ("cpu:9", "9 simulated devices are needed and JAX has made 8"),
        ("v5p:8", "expected the shape of a slice, as v5p:4x4x4"),
    ],
)
def test_a_topology_that_is_not_known_says_what_is(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_a_search_tries_what_divides():
    tried = list(candidates(tiny_run(), 8))
    assert {(one.mesh.data, one.mesh.fsdp, one.mesh.tensor) for one in tried} >= {(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)}
    assert all(one.mesh.data * one.mesh.fsdp * one.mesh.tensor == 8 for one in tried)
    assert {one.optimizer.accumulate for one in tried if one.mesh.tensor == 8} == {1, 2, 4}
    assert {one.optimizer.accumulate for one in tried if one.mesh.data == 8} == {1}


@pytest.mark.parametrize("topology", [thorough("v5e:2x2"), thorough("v5p:2x2x1"), thorough("v5e:2x2:slices=2")])
def test_a_tpu_that_is_not_here(topology):
    pytest.importorskip("libtpu")
    slices = 2 if "slices" in topology else 1
    (found,) = plan(tiny_run(mesh=MeshConfig(data=slices, fsdp=-1, tensor=2)), topology)
    assert found["fits"] and found["seconds"]["compiler"] > found["seconds"]["compute"] > 0
    axes = {axis for one in found["collectives"] for axis in one["axes"].split("*")}
    assert axes == {"fsdp", "tensor"} | ({"data"} if slices == 2 else set())
    assert found["unknown_loops"] == 2, "those over the chunks of the head, forwards and backwards"
