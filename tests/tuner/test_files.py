"""Files lie whole in their folder, whatever happens on the way, and are read from nowhere else."""

import copy
import os
import resource
import shutil
from contextlib import contextmanager
from functools import partial, wraps
from importlib.util import find_spec, module_from_spec
from threading import Thread

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_maskpro import MaskProConfig, hub, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.deploy.packed import to_packed
from hf_maskpro.hub import push_folder
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.files import inside, private_folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# In the words of whoever writes.
DISK_FULL = (OSError, RuntimeError, SafetensorError)


@contextmanager
def largest_file(size):
    """As on a full disk, what is written beyond so many bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def on_disks_of_every_size(folder, action, step):
    """
    What a folder holds after something has been written into it, on a disk with just enough room; on smaller ones, by
    so many bytes, nothing there may change.
    """
    before, failures = contents(folder), 0
    for size in range(0, 10**6, step):
        try:
            with largest_file(size):
                action()
        except DISK_FULL:
            failures += 1
            assert contents(folder) == before
        else:
            break
    assert failures > 10
    return contents(folder)


@pytest.fixture
def states(checkpoint, tmp_path):
    """A folder with an adapter, and another state of that adapter to save over it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    card.text += "\nMy own words.\n"
    card.save(folder / "README.md")
    old = contents(folder)
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"], std=20)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_bytes(old["README.md"])
    model.save_pretrained(tmp_path / "new")
    return folder, old, model, contents(tmp_path / "new")


@pytest.fixture
def tiny(tmp_path):
    """A base and an adapter of it in a folder, smaller than the other tests', and the model with the adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, MaskProConfig())
    model.save_pretrained(tmp_path / "adapter")
    # What pytest keeps of a bar is written to a file too.
    logging.disable_progress_bar()
    yield tmp_path, model
    logging.enable_progress_bar()


# All of them take half an hour.
steps = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 97])


@steps
def test_a_full_disk_leaves_the_earlier_adapter(states, step):
    folder, _, model, new = states
    assert on_disks_of_every_size(folder, lambda: model.save_pretrained(folder), step) == new


@steps
def test_a_full_disk_leaves_the_earlier_adapter_that_transformers_saved(tiny, step):
    folder, _ = tiny
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.add_adapter(MaskProConfig())
    model.save_pretrained(folder / "added")
    shutil.copytree(folder / "added", folder / "again")
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"], std=20)
    model.save_pretrained(folder / "again")
    write = partial(model.save_pretrained, folder / "added")
    assert on_disks_of_every_size(folder / "added", write, step) == contents(folder / "again")


@steps
def test_a_full_disk_leaves_the_earlier_merged_checkpoint(tiny, step):
    folder, _ = tiny
    merge(folder / "base", folder / "adapter", folder / "merged")
    expected = contents(folder)
    (folder / "merged" / "README.md").write_text("An earlier one.")
    write = partial(merge, folder / "base", folder / "adapter", folder / "merged", overwrite=True)
    assert on_disks_of_every_size(folder, write, step) == expected


@steps
def test_a_full_disk_leaves_the_earlier_packed_model(tiny, step):
    folder, model = tiny
    model = model.merge_and_unload()

    def write():
        to_packed(copy.deepcopy(model), None, folder / "packed", overwrite=True)

    write()
    expected = contents(folder)
    (folder / "packed" / "generation_config.json").write_text("An earlier one.")
    assert on_disks_of_every_size(folder, write, step) == expected


@pytest.mark.parametrize("step", range(3))
def test_a_failure_between_two_files_leaves_the_earlier_adapter(states, monkeypatch, step):
    folder, old, model, new = states
    replace, placed = os.replace, []

    def fail(source, target):
        if os.fspath(target).startswith(str(folder)) and "/." not in os.fspath(target).removeprefix(str(folder)):
            placed.append(target)
            if len(placed) == step + 1:
                raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        model.save_pretrained(folder)
    assert contents(folder) == old
    monkeypatch.undo()
    model.save_pretrained(folder)
    assert contents(folder) == new


@pytest.mark.parametrize("save_logits", [False, True])
def test_a_kill_between_two_files_leaves_an_adapter_that_is_old_or_new_or_refused(
    states, checkpoint, tmp_path, monkeypatch, save_logits
):
    folder, _, model, _ = states
    config = model.peft_config["default"]
    config.save_logits = save_logits
    model.save_pretrained(folder)
    old = masks_in(folder, checkpoint, tmp_path)
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"], std=20)
    replace, left = os.replace, []

    def note(source, target):
        replace(source, target)
        # Others are of files on their way into the temporary folder.
        if os.path.dirname(target) == str(folder):
            left.append({name: data for name, data in contents(folder).items() if not name.startswith(".")})

    monkeypatch.setattr(os, "replace", note)
    model.save_pretrained(folder)
    monkeypatch.undo()
    new = masks_in(folder, checkpoint, tmp_path)
    assert new != old
    assert len(left) == len(contents(folder))
    found = []
    for number, files in enumerate(left):
        (tmp_path / str(number)).mkdir()
        for name, data in files.items():
            (tmp_path / str(number) / name).write_bytes(data)
        found.append(masks_in(tmp_path / str(number), checkpoint, tmp_path))
    assert [None if masks == ["refused"] * 4 else masks for masks in found] == [old, None, new]


def masks_in(folder, checkpoint, tmp_path):
    """What every way of reading an adapter reads; "refused" where one line says that its files are of two saves."""

    def loaded():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder)

    def started():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = get_peft_model(model, MaskProConfig(init_mask=f"{folder}/"))
        initialize_masks(model)
        return model

    def bits(model):
        return [layer.mode_codes("default").tolist() for layer in masked_layers(model).values()]

    def merged():
        merge(checkpoint, folder, tmp_path / "merged", overwrite=True)
        weights = load_file(tmp_path / "merged" / "model.safetensors")
        return [(weights[f"{name}.weight"] != 0).tolist() for name in hub.read_masks(folder)[1]]

    ways = (
        lambda: hub.inspect_adapter(str(folder))["layers"],
        lambda: bits(loaded()),
        lambda: bits(started()),
        merged,
    )
    return [known_or_refused(way) for way in ways]


def known_or_refused(way):
    try:
        return way()
    except ValueError as error:
        lines = str(error).splitlines()
    return "refused" if len(lines) == 1 and "not those that its configuration was saved with" in lines[0] else lines


@pytest.mark.parametrize("links", [True, False])
def test_of_several_files_all_take_their_places_or_none(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError()), raising=False)
    (tmp_path / "a").write_text("old")
    replace = os.replace

    def fail(source, target):
        if os.fspath(target).endswith("z"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)

    def write():
        with private_folder(tmp_path, "a", "b") as folder:
            assert (folder / "a").read_text() == "old"
            for name in ("a", "m", "z"):
                (folder / name).write_text("new")

    with pytest.raises(OSError, match="no"):
        write()
    assert contents(tmp_path) == {"a": b"old"}
    monkeypatch.undo()
    with private_folder(tmp_path / "made") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("new")
    assert contents(tmp_path) == {"a": b"old", "made/sub/a": b"new"}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["sub"]


@steps
def test_a_result_is_recorded_whole_or_not_at_all(states, step):
    folder, old, _, _ = states
    record = partial(hub.record_evaluation, folder, "wikitext", "perplexity", 30.0, "windows of 512 tokens")
    new = on_disks_of_every_size(folder, record, step)
    assert {name for name in old if new[name] != old[name]} == {"README.md", "adapter_config.json"}


def test_two_writers_do_not_break_each_other(states):
    folder, _, model, new = states
    failures = []

    def save():
        try:
            for _ in range(5):
                model.save_pretrained(folder)
        except Exception as error:
            failures.append(error)

    writers = [Thread(target=save) for _ in range(3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add((folder / "adapter_config.json").stat().st_size > 0)
    assert not failures
    assert seen == {True}
    assert contents(folder) == new


def test_adapters_of_other_names_have_folders_and_cards_of_their_own(checkpoint, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig(), adapter_name="mine")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    card.text += "\nMy own words.\n"
    card.save(tmp_path / "mine" / "README.md")
    model.save_pretrained(tmp_path)
    assert "My own words." in (tmp_path / "mine" / "README.md").read_text()
    assert set(contents(tmp_path)) == {
        f"mine/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "mine")


def test_a_link_out_of_a_folder_is_no_file_of_it(tmp_path):
    snapshot = tmp_path / "models--me--mask" / "snapshots" / "0123"
    for folder in (snapshot / "sub", tmp_path / "models--me--mask" / "blobs", tmp_path / "other"):
        folder.mkdir(parents=True)
    blob, secret = tmp_path / "models--me--mask" / "blobs" / "abc", tmp_path / "other" / "secret"
    blob.touch()
    secret.touch()
    (snapshot / "file").symlink_to("../../blobs/abc")
    (snapshot / "sub" / "file").symlink_to("../../../blobs/abc")
    (snapshot / "near").symlink_to("file")
    for name in ("file", "sub/file", "near"):
        assert inside(snapshot, snapshot / name) == snapshot / name
    assert inside(snapshot / "sub", snapshot / "sub" / "file")
    (snapshot / "far").symlink_to(secret)
    (snapshot / "folder").symlink_to(tmp_path / "other")
    for name in ("far", "folder/secret", "../../../other/secret", "../1234"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            inside(snapshot, snapshot / name)
    # Blobs are the cache's alone.
    with pytest.raises(ValueError, match="leads out of its folder"):
        inside(tmp_path / "other", blob)


def test_a_pickle_in_the_place_of_a_mask_is_not_read(tiny, monkeypatch):
    folder, _ = tiny
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter" / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"adapter: it has no adapter_model\.safetensors, and a pickle is not read"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")


def test_what_is_not_in_the_cache_is_not_said_to_have_no_mask(tiny, monkeypatch):
    folder, model = tiny
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'runs/mask'"):
        model.load_adapter("runs/mask", "other")
    with pytest.raises((OSError, ValueError), match="outgoing traffic has been disabled"):
        model.load_adapter("runs/mask", "default", cache_dir=folder / "cache")


def test_what_others_changed_of_saving_and_loading_stays(tiny, monkeypatch):
    folder, model = tiny
    used = []

    def noted(method):
        @wraps(method)
        def other(*args, **kwargs):
            used.append(method)
            return method(*args, **kwargs)

        return other

    changed = [PreTrainedModel.save_pretrained, PeftModel.save_pretrained, PeftModel.load_adapter]
    for method, kind in zip(changed, (PreTrainedModel, PeftModel, PeftModel), strict=True):
        monkeypatch.setattr(kind, method.__name__, noted(method))
    for name in ("create_or_update_model_card", "push_to_hub"):
        monkeypatch.setattr(PeftModel, name, getattr(PeftModel, name))
    spec = find_spec(push_folder.__module__)
    spec.loader.exec_module(module_from_spec(spec))
    LlamaForCausalLM.from_pretrained(folder / "base").save_pretrained(folder / "again")
    model.save_pretrained(folder / "again")
    model.load_adapter(folder / "again", "other")
    assert used == changed


def test_of_two_adapters_an_error_says_which(tiny):
    folder, _ = tiny
    file = folder / "other" / "adapter_model.safetensors"
    shutil.copytree(folder / "adapter", folder / "other")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    masks = load_file(file)
    masks.popitem()
    save_file(masks, file)
    with pytest.raises(ValueError, match=rf"^{folder / 'other'}: the adapter"):
        model.load_adapter(folder / "other", "other")
