"""Adapters in PEFT's format beside PEFT itself: theirs read here, ours read there, equal logits of text and pictures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import asked, load, logits, picture, verbatim
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from test_llava import TEXT, llava
from torch_helpers import compare

from vlm_jax.config import LoraConfig
from vlm_jax.errors import RequestError
from vlm_jax.generation.by_layer import split_layers
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.peft import own_table
from vlm_jax.interop.peft_read import read_adapter
from vlm_jax.interop.peft_write import write_adapter
from vlm_jax.layers.lora import merged, names_of, only_adapters, with_adapters, without_adapters
from vlm_jax.paths import by_path, nested
from vlm_jax.sharding import boxed_params
from vlm_jax.training.adapters import adapter_boxes, initial_adapters

PICTURES = [picture(1, 30, 44)]
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, a function that makes the PyTorch model of it, its inputs, our model, our request)."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = llava(folder)
    vlm = load(folder)
    again = lambda: type(model).from_pretrained(folder).eval()
    return folder, again, asked(processor, [TEXT], PICTURES), vlm, verbatim(vlm, TEXT, PICTURES)


def theirs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits[0]


def made_by_peft(model, folder, seed=0, **settings):
    """An adapter with random numbers, saved; the model with it."""
    peft = get_peft_model(model, TheirConfig(**dict(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=LANGUAGE) | settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    return peft


def test_theirs_read_kept_by_name_switched_and_merged(published, tmp_path):
    """Ranks and alphas that differ by map and layer, rsLoRA, a whole module beside them, some layers without any."""
    folder, again, inputs, _, request = published
    settings = [
        dict(rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"down_proj": 3}, modules_to_save=["linear_1"]),
        dict(use_rslora=True, target_modules=["gate_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    ]
    wanted = [theirs(made_by_peft(again(), tmp_path / str(n), n, **one), inputs) for n, one in enumerate(settings)]
    folders = {"first": tmp_path / "0", "second": tmp_path / "1"}
    both = load(folder, adapters=folders)
    base = theirs(again(), inputs)
    assert both.adapters == ("first", "second")
    compare(logits(both, request), wanted[0])
    compare(logits(both.with_adapters("second"), request), wanted[1])
    compare(logits(both.with_adapters(), request), base)
    assert both.with_adapters("second").with_adapters("first").adapters == both.adapters
    assert min(np.abs(one - base).max() for one in wanted) > 0.1 and np.abs(wanted[0] - wanted[1]).max() > 0.1
    compare(logits(load(folder, adapters={"second": folders["second"]}, merge_adapters=True), request), wanted[1])
    with pytest.raises(RequestError, match="no adapter 'third'; there are first, second"):
        both.with_adapters("third")


def with_ours(vlm, *entries, seed=0):
    """Our parameters with random adapters, and the boxes of the model's own."""
    boxes = by_path(boxed_params(vlm.model))
    made = by_path(initial_adapters(adapter_boxes(boxes, entries), entries, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    random = {p: 0.2 * rng.standard_normal(x.shape, np.float32) if p.endswith("/b") else x for p, x in made.items()}
    return with_adapters(vlm.params, nested(random)), boxes


def test_ours_read_by_peft(published, tmp_path):
    folder, again, inputs, vlm, request = published
    entries = (
        LoraConfig(pattern="^language/.*attention/(query|key)", rank=2, alpha=5.0),
        LoraConfig(pattern="^language/(layers/|lm_head)", rank=3, alpha=4.0, rank_stabilised=True),
    )
    params, boxes = with_ours(vlm, *entries)
    projector = [path for path in boxes if path.startswith("connector/linear_0")]
    params["connector"]["linear_0"] = jax.tree.map(lambda x: x + 0.1, params["connector"]["linear_0"])
    table = vlm.checkpoint.adapter_tables(boxes)[0]
    write_adapter(tmp_path / "ours", "default", params, table, boxes, also=projector, base="llava")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["model.multi_modal_projector.linear_1"]
    peft = PeftModel.from_pretrained(again(), tmp_path / "ours")
    ours = logits(vlm.__class__(vlm.checkpoint, vlm.generator.with_params(params)), request)
    compare(ours, theirs(peft, inputs))
    compare(ours, theirs(peft.merge_and_unload(), inputs))
    plain = vlm.__class__(vlm.checkpoint, vlm.generator.with_params(merged(params)))
    np.testing.assert_allclose(logits(plain, request), ours, atol=1e-4)
    back = load(folder, adapters={"default": tmp_path / "ours"})
    for path, leaf in by_path(back.params).items():
        np.testing.assert_array_equal(leaf, by_path(params)[path], err_msg=path)
    # As a CPU holds the layers of a large model: the same, whether adapters are put in before or after.
    adapters = only_adapters(params)
    one_by_one = lambda tree: split_layers(jax.tree.map(jnp.array, tree))
    apart = with_adapters(one_by_one(without_adapters(params)), adapters)
    jax.tree.map(np.testing.assert_array_equal, apart, one_by_one(params))
    assert names_of(apart) == ("default",) and names_of(without_adapters(apart)) == ()


def test_our_own_names_give_the_same_back(published, tmp_path):
    _, _, _, vlm, _ = published
    params, boxes = with_ours(vlm, LoraConfig(pattern="^(vision|language)/layers|connector", rank=2, alpha=5.0, name="mine"))
    write_adapter(tmp_path / "ours", "mine", params, own_table(boxes), boxes)
    names = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert names["base_model.model.language.layers.1.attention.query.lora_B.weight"].shape == (32, 2)
    back = by_path(read_adapter(tmp_path / "ours", "other", vlm.checkpoint.adapter_tables(boxes), boxes))
    flat = {path.replace("/other/", "/mine/"): leaf for path, leaf in back.items()}
    assert flat.keys() == {path for path in by_path(params) if "/lora/" in path}
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, by_path(params)[path], err_msg=path)


def test_llavas_own_layout(published, tmp_path):
    """`finetune_lora.sh` leaves the projector in `non_lora_trainables.bin`, under its own names."""
    folder, again, inputs, _, request = published
    peft = made_by_peft(again(), tmp_path, modules_to_save=["multi_modal_projector"])
    path = tmp_path / "adapter_model.safetensors"
    theirs_now = {key: torch.tensor(value) for key, value in load_file(path).items()}
    own = lambda key: key.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
        "multi_modal_projector.linear_2", "mm_projector.2"
    )
    torch.save({own(k): v for k, v in theirs_now.items() if "projector" in k}, tmp_path / "non_lora_trainables.bin")
    language = lambda key: key.replace("model.language_model.", "model.")
    save_file({language(k): v.numpy() for k, v in theirs_now.items() if "projector" not in k}, path)
    with pytest.raises(PublishedError, match=r"non_lora_trainables\.bin, trained parameters: it is read with pickles=True"):
        load(folder, adapters={"a": tmp_path})
    compare(logits(load(folder, adapters={"a": tmp_path}, pickles=True), request), theirs(peft, inputs))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(peft_type="IA3"), "peft_type='IA3': only LORA"),
        (dict(use_dora=True), "use_dora=True: not implemented"),
        (dict(bias="all"), "bias='all'"),
        (dict(init_lora_weights="pissa"), "changed the base model's weights too"),
        (dict(r="four"), "r='four'"),
        (None, "has one of lora_A and lora_B alone"),
        ("base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight", "the model has 3 layers"),
        ("base_model.model.model.nothing.lora_A.weight", "has 1 tensors that this model has no linear map for"),
    ],
)
def test_what_cannot_be_read(published, tmp_path, changes, said):
    _, _, _, vlm, _ = published
    params, boxes = with_ours(vlm, LoraConfig(pattern="^language/layers/mlp/up", rank=2, alpha=5.0))
    tables = vlm.checkpoint.adapter_tables(boxes)
    write_adapter(tmp_path / "a", "default", params, tables[0], boxes)
    path = tmp_path / "a" / "adapter_config.json"
    if isinstance(changes, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    else:
        weights = load_file(path.with_name("adapter_model.safetensors"))
        first = next(iter(weights))
        value = weights.pop(first) if changes is None else weights[first]
        save_file(weights | ({changes: value} if changes else {}), path.with_name("adapter_model.safetensors"))
    with pytest.raises(PublishedError, match=said):
        read_adapter(tmp_path / "a", "default", tables, boxes)
