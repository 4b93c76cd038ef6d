"""
Files of strangers, altered at random: either one line says what is wrong with them, or they give exactly the mask that
a decoder of the tests' own reads in them, in two seconds and 1 GB. `make fuzz` tries many more.
"""

import ast
import io
import json
import math
import os
import re
import resource
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, initialize_masks, packed
from hf_maskpro.deploy import merge
from hf_maskpro.deploy.packed import PackedLinear, to_packed
from hf_maskpro.hub import inspect_adapter, read_masks
from hf_maskpro.hub.reading import MASK_FILE
from hf_maskpro.subset import keep_of, unpack_codes
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.card import CONFIG_FILE

from ..conftest import tiny_llama
from .test_reading import alterations, altered, no_digest


N, M = 3, 8
NAMES = ["q_proj", "down_proj"]
SECONDS, BYTES = 2, 2**30

inputs = settings(
    max_examples=int(os.environ.get("FUZZ_INPUTS", "40")),
    # The same few inputs in every run of the tests, new ones in every long run.
    derandomize="FUZZ_INPUTS" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def entries(data):
    """The tensors of a safetensors file, by the format's description: raw bytes, and what the header says of them."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (data[slice(*(start + at for at in entry["data_offsets"]))], entry) for name, entry in header.items()
    }


def array_of(raw, entry):
    """Numbers of a tensor; bfloat16 is the upper half of float32."""
    if entry["dtype"] == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    kinds = {"BOOL": "?", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
    return np.frombuffer(raw, kinds[entry["dtype"]]).reshape(entry["shape"])


def kept_by_file(data, config, learned=True):
    """
    Which weights every layer keeps, bool `[out_features, groups, m]`, by docs/file-format.md alone; what fills up the
    last word of a row is there too. Without `learned`, those of the starting mask.
    """
    n, m = config["n"], config["m"]
    sets = list(combinations(range(m), n))
    layouts = [(size, max(d for d in range(1, 60) if len(sets) ** d <= 256**size)) for size in range(1, 8)]
    size, digits = min(layouts, key=lambda layout: (layout[0] / layout[1], layout[0]))
    result, tensors = {}, entries(data)
    for name in [name for name in tensors if name.endswith(".maskpro_mask")]:
        # Of another type with the same numbers, transformers makes bytes.
        array = array_of(*tensors[name]).astype(np.uint8)
        rows, raw = len(array), array.tobytes()
        words = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
        ranks = [word // len(sets) ** d % len(sets) for word in words for d in range(digits)]
        mask = np.zeros((rows, len(ranks) // rows, m), dtype=bool)
        for index, rank in enumerate(ranks):
            mask[index // mask.shape[1], index % mask.shape[1], list(sets[rank])] = True
        # As of masks, transformers takes the dots of a name for any characters.
        thetas = [known for known in tensors if re.fullmatch(name.removesuffix("mask") + "theta", known)]
        if learned and thetas:
            theta = array_of(*tensors[thetas[0]]).transpose(0, 2, 1)
            mask = mask[:, : theta.shape[1]]
            scale = np.float32(6 if config["logit_scale"] is None else config["logit_scale"])
            order = np.argsort(-(theta + scale * mask), axis=2, kind="stable")[:, :, :n]
            mask = np.zeros_like(mask)
            np.put_along_axis(mask, order, True, axis=2)
        result[name.removeprefix("base_model.model.").removesuffix(".maskpro_mask")] = mask
    return result


def settings_of(content):
    """What a configuration leaves out has its default."""
    return MaskProConfig().to_dict() | json.loads(content[CONFIG_FILE])


def assert_kept(model, content, learned=True):
    """That the layers of a model keep what the file says."""
    expected = kept_by_file(content[MASK_FILE], settings_of(content), learned)
    for name, layer in masked_layers(model).items():
        mask = (layer.learned_mask if learned else layer.initial_mask)("default").transpose(1, 2).numpy()
        # transformers takes the dots of a name for any characters.
        (kept,) = [kept for known, kept in expected.items() if re.fullmatch(name, known)]
        assert np.array_equal(mask, kept[:, : mask.shape[1]])


@contextmanager
def limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(action, names, *others):
    """
    What an action returns, or `None` if one line says what is wrong: by our kinds of errors, with one of these names
    in it, or in the words of others.
    """
    # The first of all calls imports what it needs, and beside other processes a second of work may take longer.
    for _ in range(3):
        begun = time.process_time()
        result = once(action, names, others)
        taken = time.process_time() - begun
        if taken < SECONDS:
            break
    assert taken < SECONDS
    event("refused" if result is None else "read")
    return result


def once(action, names, others):
    with limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except others as error:
            message, names = str(error).strip(), [""]
        except (ValueError, OSError) as error:
            message = str(error).strip()
    assert message
    assert "\n" not in message
    assert any(name in message for name in names)
    return None


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
        kinds = ["dtype", "flat", "byte", "missing", "second", "renamed"] + ["rows", "columns"] * (tensor.ndim > 0)
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
            ends = [".default", ".weight", ".mask", "x"]
            tensors |= {name: tensor, name + draw(st.sampled_from(ends)): torch.zeros(2)}
        elif kind == "renamed":
            tensors[name.replace(draw(st.sampled_from([".0.", "maskpro_", "mask", "base_model."])), "x.")] = tensor
    return tensors


@st.composite
def files(draw, valid):
    """The files of an adapter, one of them altered."""
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def masked(base, **options):
    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model(model, MaskProConfig(**{"target_modules": NAMES, "n": N, "m": M} | options))


@pytest.fixture(scope="module", params=[False, True], ids=["masks", "logits"])
def adapter(request, base, tmp_path_factory):
    """The bytes of a small adapter's two files, and a folder to write altered ones to."""
    folder = tmp_path_factory.mktemp("adapter")
    model = masked(base, save_logits=request.param)
    torch.manual_seed(0)
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"], std=4)
    model.save_pretrained(folder / "adapter")
    no_digest(folder / "adapter" / CONFIG_FILE)
    return {name: (folder / "adapter" / name).read_bytes() for name in (CONFIG_FILE, MASK_FILE)}, folder / "altered"


WEIGHTS = "model.safetensors"
# What an error names that comes from a file which the user has named: the file, or a layer or a field in it.
FILES = [CONFIG_FILE, "adapter file", "adapter's", "adapter 'default'"]
# What is wrong with it before the file beside it is looked for.
OF_CONFIGURATION = [
    CONFIG_FILE,
    "adapter's configuration",
    "target_modules",
    "Target modules",
    "cannot mask",
    "other weights",
]
OF_ADAPTER = [*FILES, "model.layers.", *NAMES, "target_modules", "Target modules"]


def reading(base, content, folder):
    found = attempt(lambda: read_masks(folder), [str(folder)])
    if found is None:
        return
    config, masks = found
    expected = kept_by_file(content[MASK_FILE], config.to_dict(), learned=False)
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        kept = keep_of(unpack_codes(mask, config.n, config.m, expected[name][0].size), config.m)
        assert np.array_equal(kept.numpy(), expected[name].reshape(len(mask), -1))


def inspecting(base, content, folder):
    found = attempt(lambda: inspect_adapter(str(folder)), [str(folder)])
    if found is not None:
        assert found["layers"] == sum(name.endswith(".maskpro_mask") for name in entries(content[MASK_FILE]))


def not_ours(content):
    """PEFT reads a configuration first, and fails in its own words at what is not one of ours."""
    try:
        config = json.loads(content[CONFIG_FILE])
    except (ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or config.get("peft_type") != "MASKPRO"


def loading(base, content, folder):
    words = (KeyError, TypeError, AttributeError, ValueError) if not_ours(content) else ()

    def load():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for layer in masked_layers(model).values():
            layer.masked_weight()
        return model

    if (model := attempt(load, [str(folder), *OF_CONFIGURATION], *words)) is not None:
        assert_kept(model, content)


def adding(base, content, folder):
    words = (KeyError, TypeError, AttributeError, ValueError) if not_ours(content) else ()

    def load():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(str(folder))
        for layer in masked_layers(model).values():
            layer.masked_weight()
        return model

    # transformers makes patterns of the names in the file.
    if (model := attempt(load, OF_ADAPTER, RuntimeError, SafetensorError, re.error, *words)) is not None:
        assert_kept(model, content)


def merging(base, content, folder):
    output = folder.with_name("merged")
    if attempt(lambda: merge(base, folder, output, overwrite=True), [str(folder), *OF_ADAPTER]) is None:
        return
    weights = load_file(output / "model.safetensors")
    for name, mask in kept_by_file(content[MASK_FILE], settings_of(content)).items():
        weight = weights[f"{name}.weight"].numpy()
        assert np.array_equal(weight != 0, mask.reshape(len(mask), -1)[:, : weight.shape[1]])


@pytest.mark.parametrize("check", [reading, inspecting, loading, adding, merging])
@inputs
@given(data=st.data())
def test_altered_adapters(base, adapter, check, data):
    original, folder = adapter
    content = data.draw(files(original))
    check(base, content, write(content, folder))


SKIPPED, STATE = "skipped.json", "trainer_state.json"
# Of every estimator that keeps something: its pattern, its settings, and the file that is its own.
LEARNERS = {
    "residual": ((N, M), {}, "residual_state.json"),
    "simple": ((N, M), {"optimizer_in_backward": True}, "optimizer_in_backward.safetensors"),
    "proxsparse": ((2, 4), {}, "estimator_state.safetensors"),
    "maskllm": ((2, 4), {}, "estimator_state.safetensors"),
}


def learned(base, folder, estimator):
    """What makes a trainer over the base, and its checkpoint."""
    (n, m), options, _ = LEARNERS[estimator]
    ids = torch.arange(2, 34).view(4, 8)

    def trainer():
        arguments = MaskProTrainingArguments(
            str(folder), estimator=estimator, max_steps=1, save_steps=1, logging_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e3, warmup_steps=0, **options,
        )  # fmt: skip
        return MaskProTrainer(
            masked(base, n=n, m=m), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
        )

    trainer().train()
    return trainer, folder / "checkpoint-1"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    make, checkpoint = learned(base, tmp_path_factory.mktemp("run"), "residual")
    return make, {name: (checkpoint / name).read_bytes() for name in (CONFIG_FILE, MASK_FILE)}, checkpoint


@inputs
@given(data=st.data())
def test_altered_checkpoints(run, data):
    """Its other files are those of a `Trainer`."""
    make, original, checkpoint = run
    content = data.draw(files(original))
    write(content, checkpoint)
    trainer = make()
    if attempt(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)), [str(checkpoint)]) is not None:
        assert_kept(trainer.model, content)


@pytest.fixture(scope="module", params=LEARNERS)
def resumed(request, base, tmp_path_factory):
    """A trainer, whose every run starts anew, and its checkpoint's files that say what the estimator keeps."""
    make, checkpoint = learned(base, tmp_path_factory.mktemp("resumed"), request.param)
    state = LEARNERS[request.param][2]
    return make(), {name: (checkpoint / name).read_bytes() for name in (state, SKIPPED)}, checkpoint


@st.composite
def states(draw, original):
    """The files of an estimator, one of them altered: at random, or in one value of it."""
    name = draw(st.sampled_from([name for name in original if name != SKIPPED] * 3 + [SKIPPED]))
    if draw(st.booleans()):
        content = altered(original[name], *draw(alterations()))
    elif name == SKIPPED:
        content = json.dumps(draw(values)).encode()
    elif name.endswith(".json"):
        whole = json.loads(original[name])
        content = json.dumps(whole | {draw(st.sampled_from(sorted(whole))): draw(values)}).encode()
    else:
        content = save(draw(changed_tensors(load(original[name]))), {"format": "pt"})
    return original | {name: content}


def kept_state(estimator):
    """What an estimator goes by, as its file names it."""
    if estimator.trainer.args.estimator == "residual":
        return {"residuals": list(estimator._residuals)}
    if estimator.trainer.args.estimator == "simple":
        kept = estimator.in_backward
        kinds = {"first_moment": kept.first_moments, "second_moment": kept.second_moments, "updates": kept.updates}
        return {f"{i}.{kind}": value for kind, values in kinds.items() for i, value in enumerate(values)}
    return {str(i): value.detach() for i, value in enumerate(estimator.values)}


# Together as many as of a test of one kind.
@settings(inputs, max_examples=inputs.max_examples // len(LEARNERS))
@given(data=st.data())
def test_altered_states(resumed, data):
    trainer, original, checkpoint = resumed
    content = data.draw(states(original))
    write(content, checkpoint)
    if attempt(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)), [str(checkpoint)]) is None:
        return
    assert trainer.estimator.skipped == json.loads(content[SKIPPED])
    file = next(name for name in content if name != SKIPPED)
    kept = kept_state(trainer.estimator)
    if file.endswith(".json"):
        known = json.loads(content[file])
        assert kept == {name: known[name] for name in kept}
    else:
        known = entries(content[file])
        assert kept.keys() == known.keys()
        for name, value in kept.items():
            assert np.array_equal(value.numpy(), array_of(*known[name]))


@inputs
@given(alteration=alterations())
def test_altered_states_of_a_run(run, alteration):
    make, original, checkpoint = run
    write(original, checkpoint)
    state = (checkpoint / STATE).read_bytes()
    (checkpoint / STATE).write_bytes(altered(state, *alteration))
    trainer = make()
    try:
        if attempt(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)), [str(checkpoint)]) is not None:
            assert_kept(trainer.model, original)
    finally:
        (checkpoint / STATE).write_bytes(state)


def flat_bits(mask):
    """As MaskLLM writes masks: the highest bit first."""
    return np.packbits(mask.reshape(-1))


@pytest.fixture(scope="module")
def source(base, tmp_path_factory):
    """A mask in three forms that other projects write, and a folder to write altered ones to."""
    model = masked(base, init_mask="random")
    masks = {
        f"{name}.weight": layer.initial_mask("default").transpose(1, 2).flatten(1)
        for name, layer in masked_layers(model).items()
    }
    weights = load_file(base / "model.safetensors")
    tensors = {
        "mask.npz": {f"{name}.mask": torch.from_numpy(flat_bits(mask.numpy())) for name, mask in masks.items()},
        "mask.safetensors": {f"{name}.mask": mask for name, mask in masks.items()},
        "pruned": weights | {name: weights[name] * mask for name, mask in masks.items()},
    }
    return tensors, weights, tmp_path_factory.mktemp("source")


def encoded(form, tensors):
    if form != "mask.npz":
        return save(tensors, {"format": "pt"})
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return buffer.getvalue()


def arrays_of(form, data):
    """The arrays of a source, by the description of its format."""
    if form != "mask.npz":
        return {name: array_of(*tensor) for name, tensor in entries(data).items()}
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            raw = archive.read(name)
            long = raw[6] > 1
            start = (12 if long else 10) + int.from_bytes(raw[8 : 12 if long else 10], "little")
            header = ast.literal_eval(raw[12 if long else 10 : start].decode())
            assert not header["fortran_order"]
            kind = np.dtype(header["descr"])
            arrays[name.removesuffix(".npy")] = np.frombuffer(raw[start:], kind).reshape(header["shape"])
    return arrays


def kept_by_source(form, array, weight):
    """Which weights a source keeps, `[out_features, groups, m]`."""
    shape = (len(weight), -1, M)
    if form == "mask.npz":
        bits = [byte >> (7 - bit) & 1 for byte in array.tolist() for bit in range(8)]
        return np.array(bits[: weight.size], dtype=bool).reshape(shape)
    kept = (array != 0).reshape(shape)
    if form == "pruned":
        # Where a group has too few, the largest weights of the base join.
        size = np.abs(weight).reshape(shape) + 1e6 * kept
        kept = np.zeros_like(kept)
        np.put_along_axis(kept, np.argsort(-size, axis=2, kind="stable")[:, :, :N], True, axis=2)
    return kept


@pytest.mark.parametrize("form", ["mask.npz", "mask.safetensors", "pruned"])
@inputs
@given(data=st.data())
def test_altered_mask_sources(base, source, form, data):
    tensors, weights, folder = source
    if data.draw(st.booleans()):
        content = altered(encoded(form, tensors[form]), *data.draw(alterations()))
    else:
        own = {name: tensor for name, tensor in tensors[form].items() if name.removesuffix(".mask") in weights}
        content = encoded(form, data.draw(changed_tensors(own)))
    path = folder / form
    if form == "pruned":
        path.mkdir(exist_ok=True)
        (path / "model.safetensors").write_bytes(content)
    else:
        path.write_bytes(content)
    model = masked(base, init_mask=str(path))
    if attempt(lambda: initialize_masks(model) or model, [str(path), *weights]) is None:
        return
    # Of a checkpoint's weights none is called a mask.
    suffix = "" if form == "pruned" else ".mask"
    arrays = {name.removesuffix(suffix): array for name, array in arrays_of(form, content).items()}
    for name, layer in masked_layers(model).items():
        weight = weights[f"{name}.weight"].numpy()
        mask = layer.initial_mask("default").transpose(1, 2).numpy()
        assert np.array_equal(mask, kept_by_source(form, arrays[f"{name}.weight"], weight))


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory):
    """A packed model's folder, its tensors, and the bytes of its files."""
    try:
        packed._library()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(model, MaskProConfig(target_modules=["down_proj"])).merge_and_unload()
    to_packed(model, None, folder / "packed")
    folder /= "packed"
    valid = {name: (folder / name).read_bytes() for name in ("config.json", WEIGHTS)}
    # Not from the file, which would be mapped, and is written over.
    return folder, load(valid[WEIGHTS]), valid


def unpacked(content, name):
    """The dense weight of a packed layer of a file, bit by bit."""
    tensors = load(content)
    # Of another type with the same numbers, transformers makes those of the layer.
    values, positions = tensors[f"{name}.values"].bfloat16(), tensors[f"{name}.positions"].int()
    bits = torch.stack([(positions >> i) & 1 for i in range(32)], dim=-1).flatten(1).bool()
    assert (bits.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    weight = torch.zeros(bits.shape, dtype=torch.bfloat16)
    weight[bits] = values.flatten()
    return weight


@st.composite
def packed_files(draw, tensors, valid):
    """
    The files of a packed model, one of them altered; and whether transformers may say in its own words what is wrong.
    Of its configuration it is the part that is ours: in the rest there is a model of any size.
    """
    kind = draw(st.sampled_from(["weights", "text", "configuration", "tensors", "tensors"]))
    if kind == "tensors":
        own = {name: tensor for name, tensor in tensors.items() if name.endswith((".values", ".positions"))}
        assert own
        others = {name: tensor for name, tensor in tensors.items() if name not in own}
        return valid | {WEIGHTS: save(others | draw(changed_tensors(own)), {"format": "pt"})}, False
    if kind == "weights":
        return valid | {WEIGHTS: altered(valid[WEIGHTS], *draw(alterations()))}, False
    text = valid["config.json"]
    if kind == "text":
        start = text.index(b'"quantization_config"')
        end = text.index(b"}", start) + 1
        return valid | {
            "config.json": text[:start] + altered(text[start:end], *draw(alterations())) + text[end:]
        }, True
    config = json.loads(text)
    dense = config["quantization_config"]["modules_to_not_convert"]
    changed = draw(values | st.lists(st.sampled_from([*dense, "x", None]), max_size=len(dense)))
    config["quantization_config"]["modules_to_not_convert"] = changed
    return valid | {"config.json": json.dumps(config).encode()}, False


@inputs
@given(data=st.data())
def test_altered_packed_models(packed_model, data):
    folder, tensors, valid = packed_model
    content, in_own_words = data.draw(packed_files(tensors, valid))
    write(content, folder)
    words = (Exception,) if in_own_words else (RuntimeError, SafetensorError)
    names = ["down_proj", "modules_to_not_convert", str(folder)]
    model = attempt(lambda: AutoModelForCausalLM.from_pretrained(folder), names, *words)
    if model is not None:
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                # By their bits, since a number may be none.
                found, expected = packed.unpack(layer.values, layer.positions), unpacked(content[WEIGHTS], name)
                assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
