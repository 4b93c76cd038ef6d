import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, check_sparsity
from hf_maskpro.deploy import merge, new_folder

from .conftest import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_merged_checkpoint_is_ordinary(tmp_path, make, ids):
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, MaskProConfig()).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    report = merge(model, None, tmp_path / "merged")
    assert set(report.values()) == {0.5}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert loaded.state_dict().keys() == dense.state_dict().keys()
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}
    assert check_sparsity(tmp_path / "merged", 2, 4) == report == check_sparsity(loaded, 2, 4)
    with pytest.raises(ValueError, match="have more than 2 of 4"):
        check_sparsity(tmp_path / "base", 2, 4)


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
