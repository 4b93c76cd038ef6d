import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, check_sparsity
from hf_maskpro.deploy import merge, new_folder
from hf_maskpro.tuner import masked_layers

from .conftest import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_a_merged_checkpoint_is_ordinary(tmp_path, make, save_logits, shard, ids):
    make().save_pretrained(tmp_path / "base", max_shard_size=shard)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    model = get_peft_model(make(), MaskProConfig(init_mask="random", save_logits=save_logits)).eval()
    for layer in masked_layers(model).values():
        layer.maskpro_theta["default"].data.normal_(std=20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert set(report.values()) == {0.5}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert check_sparsity(tmp_path / "merged", 2, 4) == report == check_sparsity(loaded, 2, 4)
    with pytest.raises(ValueError, match="have more than 2 of 4"):
        check_sparsity(tmp_path / "base", 2, 4)
    dense, sparse = (headers(tmp_path / name) for name in ("base", "merged"))
    assert dense == sparse
    assert len(dense) == 1 or shard == "5KB"
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in names - set(dense):
        assert (tmp_path / "merged" / name).read_text().strip() == (tmp_path / "base" / name).read_text().strip()


def headers(folder):
    """The whole header of each weight file: metadata, names, dtypes, shapes and order."""
    return {path.name: path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")]
            for path in folder.glob("*.safetensors")}  # fmt: skip


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
    with pytest.raises(ValueError, match="is not empty"), new_folder(output):
        pass
    with pytest.raises(RuntimeError), new_folder(output, overwrite=True):
        raise RuntimeError
    assert (output / "precious").read_text() == "x"
    with new_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
