"""An adapter is anybody's data: whatever its bytes, it is read as a valid mask or refused with our error."""

import json
import math
import warnings

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig
from hf_maskpro.deploy import merge
from hf_maskpro.hub import push_folder
from hf_maskpro.hub.reading import MASK_FILE, inspect_adapter, read_masks, record_evaluation
from hf_maskpro.subset import keep_of, unpack_codes
from hf_maskpro.subset.codec import word_layout
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.card import CONFIG_FILE

from ..conftest import tiny_llama


def no_digest(path):
    """Let a configuration not say which masks it is for: then it is every other check that finds what is altered."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"masks_digest": None}))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a small adapter's two files, and a folder to write altered ones to."""
    folder = tmp_path_factory.mktemp("adapter")
    config = MaskProConfig(target_modules=["q_proj", "down_proj"], n=3, m=8)
    get_peft_model(tiny_llama(), config).save_pretrained(folder)
    no_digest(folder / CONFIG_FILE)
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, MASK_FILE)}, folder


@st.composite
def alterations(draw):
    """Changes of a file: mostly bytes replaced, which leaves its structure; also parts put in, cut out, cut off."""
    kinds = st.sampled_from(["replace"] * 5 + ["cut", "insert", "truncate"])
    new = st.binary(min_size=1, max_size=4) | st.text('0123456789-.,:"[]{}nul', min_size=1, max_size=3).map(str.encode)
    change = st.tuples(kinds, st.floats(0, 1), new, st.integers(1, 64))
    return draw(st.lists(change, min_size=1, max_size=3)), draw(st.booleans())


def altered(data: bytes, changes, head: bool) -> bytes:
    """The changes made, all of them in the first bytes, where a header is, or anywhere."""
    for kind, where, new, length in changes:
        at = int(where * (min(len(data), 600) if head else len(data)))
        if kind == "replace":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        else:
            data = data[:at]
    return data


def check_reader(valid, file, alteration):
    files, folder = valid
    content = files | {file: altered(files[file], *alteration)}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config, masks = read_masks(folder)
        except ValueError:
            return
    for mask in masks.values():
        codes = unpack_codes(mask, config.n, config.m, _inputs(mask, config))
        assert (keep_of(codes, config.m).unflatten(1, (-1, config.m)).sum(-1) == config.n).all()


def _inputs(mask, config):
    digits, size = word_layout(config.n, config.m)
    return mask.shape[1] // size * digits * config.m


files = st.sampled_from([MASK_FILE, MASK_FILE, CONFIG_FILE])
fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=2_000, deadline=None, database=None, suppress_health_check=fixtures)
@given(file=files, alteration=alterations())
def test_altered_bytes(valid, file, alteration):
    check_reader(valid, file, alteration)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None, database=None, suppress_health_check=fixtures)
@given(file=files, alteration=alterations())
def test_many_altered_bytes(valid, file, alteration):
    check_reader(valid, file, alteration)


@pytest.mark.parametrize("load", ["peft", "transformers"])
@settings(max_examples=50, deadline=None, database=None, suppress_health_check=fixtures)
@given(alteration=alterations())
def test_no_loading_path_breaks_the_pattern(valid, load, alteration):
    files, folder = valid
    (folder / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    (folder / MASK_FILE).write_bytes(altered(files[MASK_FILE], *alteration))
    base = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if load == "peft":
                model = PeftModel.from_pretrained(base, folder)
            else:
                base.load_adapter(str(folder))
                model = base
            weights = {name: layer.masked_weight() for name, layer in masked_layers(model).items()}
        # What is not a safetensors file is refused by the libraries, in words of their own.
        except (ValueError, SafetensorError, RuntimeError, OSError, KeyError, TypeError):
            return
    for weight in weights.values():
        assert ((weight.unflatten(1, (-1, 8)) != 0).sum(-1) <= 3).all()


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.base_layer.weight"]
)
def test_weights_besides_the_masks_are_refused(valid, key):
    files, folder = valid
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tensors = load_file(folder / MASK_FILE)
    save_file(tensors | {f"base_model.model.{key}": torch.full((34, 16), 7.0)}, folder / MASK_FILE)
    with pytest.raises(ValueError, match="neither a mask nor of modules_to_save"):
        read_masks(folder)
    with pytest.raises(ValueError, match="has weights besides its masks"):
        PeftModel.from_pretrained(tiny_llama(), folder)


def test_a_configuration_too_large_to_be_one(valid):
    files, folder = valid
    (folder / CONFIG_FILE).write_bytes(files[CONFIG_FILE] + b" " * 2**24)
    with pytest.raises(ValueError, match="a configuration at most"):
        read_masks(folder)


def test_unknown_keys_of_a_configuration_are_ignored(valid):
    files, folder = valid
    config = json.loads(files[CONFIG_FILE]) | {"from_the_future": 1}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / MASK_FILE).write_bytes(files[MASK_FILE])
    with pytest.warns(UserWarning, match="from_the_future"):
        read_masks(folder)


@pytest.mark.parametrize("key", ["other\nline", "\x1b[2Jcode"])
def test_names_of_tensors_stay_within_the_line_of_an_error(valid, key):
    files, folder = valid
    for name, data in files.items():
        (folder / name).write_bytes(data)
    save_file(load_file(folder / MASK_FILE) | {f"{key}.weight": torch.zeros(2, 2)}, folder / MASK_FILE)
    tiny_llama().save_pretrained(folder / "base")
    for read in (
        lambda: read_masks(folder),
        lambda: merge(folder / "base", folder, folder / "merged"),
        lambda: PeftModel.from_pretrained(tiny_llama(), folder),
    ):
        with pytest.raises(ValueError, match=r"\\n|\\x1b") as error:
            read()
        assert str(error.value).isprintable()


def test_a_result_goes_beside_a_mask_whose_configuration_says_no_more_than_it_must(valid, tmp_path):
    files, _ = valid
    known = json.loads(files[CONFIG_FILE])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    needed = {"peft_type", "n", "m", "target_modules", "format_version", "lineage", "target_weights"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({name: known[name] for name in needed}))
    record_evaluation(tmp_path, "text", "perplexity", 2.0, "p")
    assert "2.0" in (tmp_path / "README.md").read_text()
    (tmp_path / CONFIG_FILE).write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"adapter_config.json is not the configuration of a mask adapter"):
        record_evaluation(tmp_path, "text", "perplexity", 2.0, "p")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON file"):
        push_folder(tmp_path, "me/mask")


RESULT = {"dataset": "d", "metric": "perplexity", "protocol": "p"}


@pytest.mark.parametrize(
    "change",
    [
        {"lineage": [5]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {"a": "much"}}]},
        {"lineage": [{}]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {"a": 1.5}}]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {}, "changed": float("nan")}]},
        {"target_weights": "many"},
        {"n": "2"},
        {"m": 1e300},
        {"peft_type": "LORA"},
        {"peft_type": None},
        {"init_mask": 3},
        {"base_fingerprint": [1, 2]},
        {"target_modules": 5},
        {"logit_scale": "high"},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {}, "calibration": {}}]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {}, "evaluations": [5]}]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {}, "evaluations": [RESULT | {"value": float("nan")}]}]},
        {"lineage": [{"init_mask": "wanda", "groups_changed": {}, "evaluations": [RESULT | {"value": -math.inf}]}]},
    ],
)
def test_a_configuration_of_other_types_is_refused(valid, change):
    files, folder = valid
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads(files[CONFIG_FILE]) | change))
    (folder / MASK_FILE).write_bytes(files[MASK_FILE])
    with pytest.raises(ValueError, match=r"not the configuration of a mask adapter|not a mask adapter"):
        read_masks(folder)


def test_a_share_of_groups_is_one_of_all_groups_and_bits_are_those_of_the_masks(checkpoint, tmp_path):
    """As the card and a training's log say them; small layers with many changes do not count as much as large ones."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig(modules_to_save=["norm"]))
    layers = masked_layers(model)
    for name, layer in layers.items():
        if name.endswith("k_proj"):
            torch.nn.init.normal_(layer.maskpro_theta["default"], std=40)
    model.save_pretrained(tmp_path)
    moved = sum(int((lay.mode_codes("default") != lay.initial_codes("default")).sum()) for lay in layers.values())
    share = moved / sum(layer.initial_codes("default").numel() for layer in layers.values())
    found = inspect_adapter(str(tmp_path))
    assert found["groups_changed"] == [pytest.approx(share)]
    card = (tmp_path / "README.md").read_text()
    assert f"| {100 * share:.2f} % |" in card.partition("## How the mask was made")[2].partition("<details>")[0]
    packed = sum(layer.maskpro_mask["default"].nbytes for layer in layers.values())
    assert found["bits_per_weight"] == 8 * packed / found["target_weights"]
    assert f"{found['bits_per_weight']:.3f} bits" in card
    assert found["file_bytes"] > packed


def test_a_lineage_without_the_share_of_all_groups_is_read(valid):
    files, folder = valid
    config = json.loads(files[CONFIG_FILE])
    del config["lineage"][0]["changed"]
    names = list(config["lineage"][0]["groups_changed"])
    config["lineage"][0]["groups_changed"] = {name: 0.5 * (i % 2) for i, name in enumerate(names)}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / MASK_FILE).write_bytes(files[MASK_FILE])
    assert inspect_adapter(str(folder))["groups_changed"] == [0.25]


def test_a_link_to_a_file_elsewhere_is_not_pushed(valid, tmp_path):
    for name, data in valid[0].items():
        (tmp_path / name).write_bytes(data)
    secret = tmp_path.parent / f"{tmp_path.name}.secret"
    secret.write_text("secret")
    (tmp_path / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"notes\.txt leads out of its folder, to .*secret"):
        push_folder(tmp_path, "me/mask")


def test_what_may_run_code_is_not_pushed(valid, tmp_path, monkeypatch):
    for name, data in valid[0].items():
        (tmp_path / name).write_bytes(data)
    for name in ("training_args.bin", "a.PT", "a.pickle", "a.ckpt", "a.joblib"):
        (tmp_path / name).touch()
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/mask"))
    monkeypatch.setattr(HfApi, "create_commit", lambda _, repo, files, **__: [file.path_in_repo for file in files])
    assert set(push_folder(tmp_path, "me/mask")) == set(valid[0])


def test_pickles_are_not_read(checkpoint, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig())
    model.save_pretrained(tmp_path)
    (tmp_path / MASK_FILE).rename(tmp_path / "kept")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="not a file of masks"):
        read_masks(tmp_path)
