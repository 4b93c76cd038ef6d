"""
Files of strangers, altered at random: either one line says what is wrong with them, or they give exactly the mask that
a decoder of the tests' own reads in them. `pytest -m slow tests/hub/test_fuzz.py` tries many more.
"""

import json
import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, packed
from hf_maskpro.deploy import merge
from hf_maskpro.deploy.packed import PackedLinear, to_packed
from hf_maskpro.hub import inspect_adapter
from hf_maskpro.hub.reading import MASK_FILE
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.card import CONFIG_FILE

from ..conftest import tiny_llama
from .test_reading import alterations, altered


N, M = 3, 8
# Digits and bytes of a word, as docs/file-format.md says how they are found.
DIGITS, SIZE = 4, 3
NAMES = ["q_proj", "down_proj"]

options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
few, many = settings(max_examples=40, **options), settings(max_examples=4_000, **options)


def kept_by_file(data: bytes, config: dict) -> dict[str, np.ndarray]:
    """Which weights every layer keeps, bool `[out_features, in_features]`, by the format's description alone."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    n, m, sets = config["n"], config["m"], list(combinations(range(config["m"]), config["n"]))
    assert (n, m) == (N, M)

    def array(name):
        entry = header[name]
        first, last = (start + offset for offset in entry["data_offsets"])
        return data[first:last], entry

    result = {}
    for name in [name for name in header if name.endswith(".maskpro_mask")]:
        raw, entry = array(name)
        rows = entry["shape"][0]
        words = [int.from_bytes(raw[i : i + SIZE], "little") for i in range(0, len(raw), SIZE)]
        ranks = [word // len(sets) ** d % len(sets) for word in words for d in range(DIGITS)]
        mask = np.zeros((rows, len(ranks) // rows, m), dtype=bool)
        for index, rank in enumerate(ranks):
            mask[index // mask.shape[1], index % mask.shape[1], list(sets[rank])] = True
        if (theta_name := name.replace("_mask", "_theta")) in header:
            raw, entry = array(theta_name)
            if entry["dtype"] == "F32":
                theta = np.frombuffer(raw, np.float32)
            else:
                theta = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            theta = theta.reshape(entry["shape"]).transpose(0, 2, 1)
            mask = mask[:, : theta.shape[1]]
            scale = np.float32(6 if config["logit_scale"] is None else config["logit_scale"])
            logits = theta + scale * mask
            order = np.argsort(-logits, axis=2, kind="stable")[:, :, :n]
            mask = np.zeros_like(mask)
            np.put_along_axis(mask, order, True, axis=2)
        result[name.removeprefix("base_model.model.").removesuffix(".maskpro_mask")] = mask.reshape(rows, -1)
    return result


@pytest.fixture(scope="module", params=[False, True], ids=["masks", "logits"])
def valid(request, tmp_path_factory):
    """The bytes of a small adapter's two files, its base, and a folder to write altered ones to."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama().save_pretrained(folder / "base")
    config = MaskProConfig(target_modules=NAMES, n=N, m=M, save_logits=request.param)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    torch.manual_seed(0)
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"], std=4)
    model.save_pretrained(folder / "adapter")
    return {name: (folder / "adapter" / name).read_bytes() for name in (CONFIG_FILE, MASK_FILE)}, folder


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(MaskProConfig().to_dict())


@st.composite
def changed_tensors(draw, tensors):
    """Tensors of another type, shape or content, left out, or with a second name."""
    tensors = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        tensor = tensors.pop(name)
        kinds = ["dtype", "rows", "columns", "flat", "byte", "missing", "second", "renamed"]
        kind = draw(st.sampled_from(kinds + ["number"] * tensor.is_floating_point()))
        if kind == "dtype":
            dtypes = [torch.int64, torch.int32, torch.int8, torch.bool, torch.float16, torch.float64]
            tensors[name] = tensor.to(draw(st.sampled_from(dtypes)))
        elif kind == "rows":
            tensors[name] = tensor[: draw(st.integers(0, len(tensor) - 1))].contiguous()
        elif kind == "columns":
            tensors[name] = tensor[..., : draw(st.integers(0, tensor.shape[-1] - 1))].contiguous()
        elif kind == "flat":
            tensors[name] = tensor.flatten()
        elif kind == "byte":
            raw = bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
            tensors[name] = torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        elif kind == "number":
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(
                st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -0.0])
            )
        elif kind == "second":
            tensors |= {name: tensor, name + draw(st.sampled_from([".default", ".weight", "x"])): torch.zeros(2)}
        elif kind == "renamed":
            tensors[name.replace(draw(st.sampled_from([".0.", "maskpro_", "mask", "base_model."])), "x.")] = tensor
    return tensors


@st.composite
def files(draw, valid):
    """Both files of an adapter, one of them altered."""
    content = dict(valid)
    kind = draw(st.sampled_from(["bytes", "configuration", "tensors"]))
    if kind == "bytes":
        name = draw(st.sampled_from(sorted(content)))
        content[name] = altered(content[name], *draw(alterations()))
    elif kind == "configuration":
        config = json.loads(content[CONFIG_FILE])
        fields = draw(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
        content[CONFIG_FILE] = json.dumps(config | fields).encode()
    else:
        content[MASK_FILE] = save(draw(changed_tensors(load(content[MASK_FILE]))), {"format": "pt"})
    return content


def write(content, folder):
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def refused(action, *named):
    """Whether an action raises an error of one line with one of these words in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except (ValueError, OSError, SafetensorError) as error:
            message = str(error).strip()
        else:
            return False
    assert "\n" not in message
    assert not named or any(word in message for word in named)
    return True


def check_reading(valid, data):
    original, folder = valid
    content = data.draw(files(original))
    adapter = write(content, folder / "altered")
    wrong = refused(lambda: inspect_adapter(str(adapter)), str(adapter), "adapter file")
    if not wrong:
        kept = kept_by_file(content[MASK_FILE], json.loads(content[CONFIG_FILE]) | {"n": N, "m": M})
        assert all((mask.reshape(len(mask), -1, M).sum(-1) == N).all() for mask in kept.values())


def check_loading(valid, data):
    original, folder = valid
    content = data.draw(files(original))
    adapter = write(content, folder / "altered")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            layers = masked_layers(PeftModel.from_pretrained(base, adapter))
            weights = {name: layer.masked_weight().detach() for name, layer in layers.items()}
        # What is no safetensors file, or not PEFT's, is refused by the libraries in words of their own.
        except (ValueError, SafetensorError, RuntimeError, OSError, KeyError, TypeError, AttributeError):
            return
    expected = kept_by_file(content[MASK_FILE], json.loads(content[CONFIG_FILE]))
    for name, weight in weights.items():
        assert np.array_equal((weight != 0).numpy(), expected[name][:, : weight.shape[1]])


def check_merging(valid, data):
    original, folder = valid
    content = data.draw(files(original))
    adapter = write(content, folder / "altered")
    wrong = refused(lambda: merge(folder / "base", adapter, folder / "merged", overwrite=True))
    if wrong:
        return
    expected = kept_by_file(content[MASK_FILE], json.loads(content[CONFIG_FILE]))
    weights = load_file(folder / "merged" / "model.safetensors")
    for name, mask in expected.items():
        weight = weights[f"{name}.weight"]
        assert np.array_equal((weight != 0).numpy(), mask[:, : weight.shape[1]])


checks = pytest.mark.parametrize("check", [check_reading, check_loading, check_merging])


@checks
@few
@given(data=st.data())
def test_altered_adapters(valid, check, data):
    check(valid, data)


@pytest.mark.slow
@checks
@many
@given(data=st.data())
def test_many_altered_adapters(valid, check, data):
    check(valid, data)


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory):
    """A packed model's folder, its tensors, and the dense weights that it stands for."""
    try:
        packed._library()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(model, MaskProConfig(target_modules=["down_proj"])).merge_and_unload()
    to_packed(model, None, folder / "packed")
    return folder / "packed", load_file(folder / "packed" / "model.safetensors")


def check_packed_model(packed_model, data):
    folder, tensors = packed_model
    own = {name: tensor for name, tensor in tensors.items() if name.endswith((".values", ".positions"))}
    assert own
    changed = data.draw(changed_tensors(own))
    content = {name: tensor for name, tensor in tensors.items() if name not in own} | changed
    (folder / "model.safetensors").write_bytes(save(content, {"format": "pt"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
        except (ValueError, RuntimeError, OSError, SafetensorError):
            return
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(packed.unpack(layer.values, layer.positions), unpacked(content, name))


def unpacked(content, name):
    """The dense weight of a packed layer of a file, bit by bit."""
    values, positions = content[f"{name}.values"].bfloat16(), content[f"{name}.positions"]
    bits = torch.stack([(positions >> i) & 1 for i in range(32)], dim=-1).flatten(1).bool()
    assert (bits.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    weight = torch.zeros(bits.shape, dtype=torch.bfloat16)
    weight[bits] = values.flatten()
    return weight


@few
@given(data=st.data())
def test_altered_packed_models(packed_model, data):
    check_packed_model(packed_model, data)


@pytest.mark.slow
@many
@given(data=st.data())
def test_many_altered_packed_models(packed_model, data):
    check_packed_model(packed_model, data)
