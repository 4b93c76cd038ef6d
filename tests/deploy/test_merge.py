import json
import os
import runpy
import shutil
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_maskpro import MaskProConfig, check_sparsity
from hf_maskpro.deploy import merge, new_folder
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.base import HALF, UNKNOWN
from hf_maskpro.tuner.files import private_folder

from ..conftest import headers, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (8, 16)])
def test_a_merged_checkpoint_is_ordinary(tmp_path, make, save_logits, shard, n, m, ids):
    make().save_pretrained(tmp_path / "base", max_shard_size=shard)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    model = get_peft_model(make(), MaskProConfig(n=n, m=m, init_mask="random", save_logits=save_logits)).eval()
    for layer in masked_layers(model).values():
        layer.maskpro_theta["default"].data.normal_(std=20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert set(report.values()) == {1 - n / m}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert check_sparsity(tmp_path / "merged", n, m) == report == check_sparsity(loaded, n, m)
    with pytest.raises(ValueError, match=f"have more than {n} of {m}"):
        check_sparsity(tmp_path / "base", n, m)
    dense, sparse = (headers(tmp_path / name) for name in ("base", "merged"))
    assert dense == sparse
    assert len(dense) == 1 or shard == "5KB"
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {"README.md"}
    assert f"# {n}:{m} sparse weights" in ModelCard.load(tmp_path / "merged" / "README.md").text
    for name in names - set(dense):
        assert (tmp_path / "merged" / name).read_text().strip() == (tmp_path / "base" / name).read_text().strip()


def test_a_checkpoint_whose_names_lack_a_prefix(tmp_path, ids):
    """As GPT-2 is on the Hub."""
    tiny_gpt2().transformer.save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_gpt2(), MaskProConfig()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert set(merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged").values()) == {0.5}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_experts_that_are_not_masked_stay_as_they_are(tmp_path, ids):
    def mixtral():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=34, num_hidden_layers=1, num_local_experts=2, **sizes)
        ).eval()

    mixtral().save_pretrained(tmp_path / "base")
    assert b"experts.0.w1" in headers(tmp_path / "base")["model.safetensors"]
    model = get_peft_model(mixtral(), MaskProConfig(target_modules=["q_proj", "o_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report == {f"model.layers.0.self_attn.{name}_proj.weight": 0.5 for name in "qo"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    model.to_empty(device="cpu").load_state_dict({key: torch.ones_like(w) for key, w in model.state_dict().items()})
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, MaskProConfig(inference_mode=True)).save_pretrained(tmp_path / "adapter")
    del model
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert size > 200e6
    peak = [anonymous_bytes()]
    before, done = peak[0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    done.set()
    watcher.join()
    assert peak[0] - before < 0.5 * size


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_other_adapters(tmp_path):
    """What docs/deploy.md says of them; the first is PEFT's doing."""
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        masked.add_adapter("lora", LoraConfig())
    lora = get_peft_model(masked.merge_and_unload(), LoraConfig(init_lora_weights=False))
    with pytest.raises(ValueError, match="groups have more than 2 of 4"):
        check_sparsity(lora.merge_and_unload(), 2, 4)
    with pytest.raises(ValueError, match="another adapter is on it already"):
        get_peft_model(get_peft_model(tiny_llama(), LoraConfig()), MaskProConfig())
    two = get_peft_model(tiny_llama(), MaskProConfig())
    two.add_adapter("other", MaskProConfig(n=1, init_mask="random"))
    assert set(check_sparsity(two.merge_and_unload(), 2, 4).values()) == {0.5}


def test_of_two_kinds_of_weights_those_that_transformers_loads(tmp_path):
    """Beside `model.safetensors` an index is stale."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    tiny_llama().save_pretrained(base)
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(tmp_path / "adapter")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"sparsity_config": {}})
    )
    merge(base, tmp_path / "adapter", merged)
    assert not (merged / "model.safetensors.index.json").exists()
    assert "sparsity_config" not in (merged / "config.json").read_text()
    shutil.copy(base / "model.safetensors", merged / "dense.safetensors")
    check_sparsity(merged, 2, 4)
    with pytest.raises(ValueError, match="groups have more than 2 of 4"):
        check_sparsity(base, 2, 4)


@pytest.mark.parametrize("output", ["base", "adapter", "."])
def test_what_is_merged_is_never_overwritten(tmp_path, output):
    tiny_llama().save_pretrained(tmp_path / "base")
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="which would be lost; choose another output folder"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / output, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\x10")
    named = r"base/model\.safetensors is not a whole safetensors file"
    with pytest.raises(ValueError, match=named):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match=named):
        check_sparsity(tmp_path / "base", 2, 4)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with new_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), new_folder(tmp_path / "a", overwrite=True):
        pass
    assert [path.name for path in tmp_path.rglob("new")] == ["new"]


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """As a mount of a container."""
    monkeypatch.setattr("hf_maskpro.deploy.folders._stays", lambda output: output.name == "out")
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    in_use = pytest.raises(ValueError, match="is not empty, and cannot be renamed as a whole")
    with in_use, new_folder(tmp_path / "out", overwrite=True):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_with_the_longest_name(tmp_path, there):
    output = tmp_path / ("x" * 255)
    if there:
        output.mkdir()
        (output / "old").touch()
    with new_folder(output, overwrite=there) as folder:
        (folder / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(("n", "m"), [(4, 2), (0, 4), (5, 4), (1, 0)])
def test_patterns_that_are_none(n, m):
    with pytest.raises(ValueError, match="is no pattern"):
        check_sparsity(tiny_llama(), n, m)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(adapter)
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained(tmp_path / "lora")
    get_peft_model(tiny_llama(), MaskProConfig(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "head")

    def refused(match, base=base, adapter=adapter):
        with pytest.raises(ValueError, match=match):
            merge(base, adapter, tmp_path / "merged")
        assert not [path for path in tmp_path.iterdir() if "merged" in path.name]

    refused("is a LORA adapter, not a mask adapter: .* dense again", adapter=tmp_path / "lora")
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    refused(r"learned for other weights than model\.layers\.0\.", base=other)
    refused("also holds lm_head.weight, from modules_to_save", adapter=tmp_path / "head")
    refused("has no config.json", base=tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused("is quantized; merge into the checkpoint that it was quantized from")
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    refused(r"the checkpoint has shape|has 16 rows")
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")
    refused(r"model\.layers\.1\.mlp\.up_proj has no tensor of its own in the checkpoint")
    weights["model.layers.1.mlp.up_proj.weight"] = lost.index_fill(0, torch.tensor([0]), torch.inf)
    save_file(weights, base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_fingerprint": None}))
    refused(r"model\.layers\.1\.mlp\.up_proj\.weight: a kept weight is not finite")


def test_what_cannot_be_compared_is_merged_with_the_warning_of_loading_it(tmp_path, checkpoint):
    half, adapter = tmp_path / "half", tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig()).save_pretrained(adapter)
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(half)
    for base, warning in ((half, HALF), (checkpoint, UNKNOWN)):
        with pytest.warns(UserWarning, match=warning):
            merge(base, adapter, tmp_path / "merged", overwrite=True)
        check_sparsity(tmp_path / "merged", 2, 4)
        with pytest.warns(UserWarning, match=warning):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_fingerprint": None}))


@pytest.mark.parametrize("linked", ["folder", "files", "weights"])
def test_a_checkpoint_of_links_is_merged(tmp_path, linked):
    """As those make who have no room for a second copy."""
    real, base, adapter = tmp_path / "real", tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(real, max_shard_size="5KB")
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(adapter)
    expected = merge(real, adapter, tmp_path / "expected")
    if linked == "folder":
        base.symlink_to(real)
    else:
        base.mkdir()
        for file in real.iterdir():
            if linked == "files" or file.suffix == ".safetensors":
                (base / file.name).symlink_to(file)
            else:
                shutil.copyfile(file, base / file.name)
    assert merge(base, adapter, tmp_path / "merged") == expected
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()
    assert check_sparsity(tmp_path / "merged", 2, 4) == expected


@pytest.mark.parametrize("link", ["LICENSE", "tokenizer.json", "index", "weights"])
def test_nothing_outside_of_the_base_comes_into_a_merged_checkpoint(tmp_path, link):
    base, adapter, outside = tmp_path / "base", tmp_path / "adapter", tmp_path / "outside"
    tiny_llama().save_pretrained(base)
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(adapter)
    outside.mkdir()
    if link == "index":
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").rename(outside / "x.safetensors")
        index = {"weight_map": dict.fromkeys(weights, "../outside/x.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    elif link == "weights":
        (base / "model.safetensors").rename(outside / "x.safetensors")
        (base / "model.safetensors").symlink_to(outside / "x.safetensors")
        (outside / "deeper").mkdir()
        (outside / "deeper" / "secret").touch()
        (base / "notes.txt").symlink_to(outside / "deeper" / "secret")
    else:
        if (base / link).exists():
            (base / link).rename(outside / link)
        else:
            (outside / link).write_text("secret")
        (base / link).symlink_to(outside / link)
    with pytest.raises(ValueError, match=r"leads out of its folder, to .*outside"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


WRONG_JSON = {
    "model.safetensors.index.json": {
        "": "is no JSON file",
        "[" * 10**5: "is no JSON file",
        "[1]": "is no object",
        "{}": "weight_map is 'None'",
        '{"weight_map": []}': "weight_map is",
        '{"weight_map": {"a": 1}}': "weight_map is",
        '{"weight_map": {"a": "gone.safetensors"}}': "gone.safetensors",
    },
    "config.json": {
        "": "is no JSON file",
        "null": "is no object",
        '{"model_type": "no-such-type"}': "no-such-type",
        '{"model_type": "llama", "hidden_size": "many"}': "hidden_size",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG_JSON.items() for text in texts])
def test_malformed_json_of_a_base_is_refused_by_name(tmp_path, name, text):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base, max_shard_size="5KB")
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(adapter)
    (base / name).write_text(text)
    for action in (lambda: merge(base, adapter, tmp_path / "merged"), lambda: check_sparsity(base, 2, 4)):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            action()
        message = str(error.value)
        assert "\n" not in message
        assert str(base) in message
        assert WRONG_JSON[name][text] in message
    assert not (tmp_path / "merged").exists()


def test_a_snapshot_of_the_hubs_cache_is_merged(tmp_path):
    """Its files are links to blobs."""
    adapter, snapshot = tmp_path / "adapter", tmp_path / "models--me--base" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--base" / "blobs"
    tiny_llama().save_pretrained(blobs)
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(adapter)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    merge(snapshot, adapter, tmp_path / "merged")
    check_sparsity(tmp_path / "merged", 2, 4)


def test_a_state_dict_is_checked_by_its_names():
    model = get_peft_model(tiny_llama(), MaskProConfig()).merge_and_unload()
    state = model.state_dict()
    assert len(check_sparsity(state, 2, 4)) == 14
    state["model.layers.1.mlp.up_proj.weight"][3, :3] = 1
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 128 groups"):
        check_sparsity(state, 2, 4)
    with pytest.raises(ValueError, match="no linear weight"):
        check_sparsity({}, 2, 4)
    with pytest.raises(ValueError, match="nothing is not a linear weight"):
        check_sparsity(state, 4, 4, names=["nothing"])


def test_fewer_non_zeros_than_allowed_are_valid():
    assert check_sparsity({"a.weight": torch.tensor([[0.0, 0, 0, 1]])}, 2, 4) == {"a.weight": 0.75}


def test_nothing_on_disk_is_lost(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty; .* or pass overwrite=True"), new_folder(output):
        pass
    with pytest.raises(RuntimeError), new_folder(output, overwrite=True):
        raise RuntimeError
    assert (output / "precious").read_text() == "x"
    with new_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a file or device"), new_folder(tmp_path / "pipe", overwrite):
            pass
    with pytest.raises(ValueError, match="is no file, and would be lost"), private_folder(tmp_path) as folder:
        (folder / "pipe").write_text("a plot")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_fine_tuning_keeps_zeros(tmp_path, checkpoint, text, monkeypatch, capsys):
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig()).save_pretrained(tmp_path / "a")
    merge(checkpoint, tmp_path / "a", tmp_path / "sparse")
    script = Path(__file__).parents[2] / "examples" / "sparse_finetune.py"
    command = [script, "--model", tmp_path / "sparse", "--text", text, "--output", tmp_path / "tuned"]
    command += ["--max-steps", "3", "--learning-rate", "0.01", "--seq-len", "16"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    runpy.run_path(str(script), run_name="__main__")
    assert "14 layers are still 2:4" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "tuned"))
    for name in check_sparsity(tmp_path / "tuned", 2, 4):
        dropped = before[name] == 0
        assert not after[name][dropped].any()
        assert (after[name] != before[name])[~dropped].float().mean() > 0.9
