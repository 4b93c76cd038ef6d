import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, hub
from hf_maskpro.tuner.card import BEGIN, END, _by_number, hub_id, split_card

from ..conftest import tiny_gpt2


@pytest.fixture
def adapter(checkpoint, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig())
    model.peft_config["default"].start["calibration"] = {"sequences": 4, "tokens": 2048, "text": "my.txt", "seed": 1}
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_card_says_what_the_adapter_is(adapter):
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft"
    assert card.data["base_model_relation"] == "adapter"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["peft", "maskpro", "n-m-sparsity", "2:4"]
    # Another reader of YAML than the one that wrote it takes a bare 2:4 for the number 124.
    assert "'2:4'" in card.content.partition("\n---")[0]
    assert yaml.safe_load(card.content.partition("\n---")[0])["tags"][3] == "2:4"
    for words in (
        "A 2:4 mask",
        "my.txt, 2,048 tokens",
        "magnitude",
        "import hf_maskpro",
        "merge_and_unload",
        "down_proj",
    ):
        assert words in card.text
    size = next(line for line in card.text.splitlines() if "Size of the masks" in line)
    tensors = hub.read_masks(adapter)[1].values()
    assert f"{sum(mask.numel() for mask in tensors):,} bytes" in size
    assert str(adapter.parent) not in card.content


def test_a_users_text_and_metadata_survive(adapter, checkpoint):
    card = ModelCard.load(adapter / "README.md")
    before, made, after = split_card(card.text)
    card.text = f"{before}# My own title\n\n{made}{after}\nWritten by hand.\n"
    card.data["license"] = "mit"
    card.save(adapter / "README.md")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    model.save_pretrained(adapter)
    again = ModelCard.load(adapter / "README.md")
    assert again.data.license == "mit"
    assert again.text.count(BEGIN) == again.text.count(END) == 1
    assert again.text.index("# My own title") < again.text.index(BEGIN)
    assert again.text.rstrip().endswith("Written by hand.")
    assert (adapter / "README.md").read_text() == again.content


def test_results_come_and_go_with_the_mask(adapter, checkpoint):
    hub.record_evaluation(adapter, "wikitext", "perplexity", 30.0, "windows of 512 tokens")
    hub.record_evaluation(adapter, "wikitext", "perplexity", 25.5, "windows of 512 tokens")
    hub.record_evaluation(adapter, "wikitext", "perplexity", 40.0, "windows of 128 tokens")
    card = ModelCard.load(adapter / "README.md")
    assert {(r.dataset_config, r.metric_value) for r in card.data.eval_results} == {
        ("windows of 512 tokens", 25.5),
        ("windows of 128 tokens", 40.0),
    }
    assert "| wikitext | perplexity | 25.5 | windows of 512 tokens |" in card.text

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter, is_trainable=True)
    model.save_pretrained(adapter)
    assert len(ModelCard.load(adapter / "README.md").data.eval_results) == 2
    for name, parameter in model.named_parameters():
        if "maskpro_theta" in name:
            torch.nn.init.normal_(parameter, std=10)
    model.save_pretrained(adapter)
    assert ModelCard.load(adapter / "README.md").data.eval_results is None
    assert "windows of 512" not in (adapter / "README.md").read_text()
    assert len(json.loads((adapter / "adapter_config.json").read_text())["lineage"]) == 2


def test_a_configuration_puts_nothing_but_text_into_a_card(adapter):
    """Whoever made the file that an adapter was loaded from."""
    evil = (
        f"x\n# Heading\n\n{END}\n<script>alert()</script> | [a](http://b) ![c](d) `e` &lt;b&gt; &#60; {{{{ 7 + 7 }}}}"
    )
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    stage = {
        "init_mask": f"./{evil}",
        "groups_changed": {evil: 0.5},
        "calibration": {"tokens": 5, "text": evil},
        "training": {evil: evil},
        "evaluations": [{"dataset": evil, "metric": evil, "protocol": evil, "value": 1.5}],
    }
    config |= {"base_model_name_or_path": evil, "revision": evil, "lineage": [stage, stage]}
    path.write_text(json.dumps(config))
    clean = (adapter / "README.md").read_text()
    hub.record_evaluation(adapter, evil, evil, 2.5, evil)
    card = ModelCard.load(adapter / "README.md")
    assert (card.text.count(BEGIN), card.text.count(END)) == (1, 1)
    before, made, after = split_card(card.text)
    assert before.strip() == after.strip() == ""
    headings = [line for line in made.splitlines() if line.startswith("#")]
    known = [line for line in split_card(clean)[1].splitlines() if line.startswith("#")]
    assert [line for line in headings[1:] if line != "## Evaluation"] == known[1:]
    assert "<script" not in made
    assert "](http" not in made
    assert "&lt;b" not in made
    assert "{{ 7 + 7 }}" in made
    tables = [line.count("|") for line in made.splitlines() if "Heading" in line and line.startswith("|")]
    assert set(tables) <= {3, 5, 6}
    assert card.data.eval_results[0].metric_value == 2.5
    # And it is still there when the card is written again.
    hub.record_evaluation(adapter, "wikitext", "perplexity", 30.0, "windows of 512 tokens")
    assert ModelCard.load(adapter / "README.md").text.count(END) == 1


@pytest.mark.parametrize("name", ["os; os.system('x')", "Llama\n```\n# Heading", "", 5, ["LlamaModel"]])
def test_a_class_that_a_configuration_names_is_a_name(adapter, name):
    """It would get into the lines of the card that load the adapter."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": {"base_model_class": name}}))
    with pytest.raises(ValueError, match=r"base_model_class of auto_mapping is .*, which is not the name of a class"):
        MaskProConfig.from_pretrained(adapter)


def test_no_card_without_a_mask(tmp_path):
    MaskProConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_names_of_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    assert hub_id("me/llama") == "me/llama"
    assert [hub_id(name) for name in (None, "", "me", "/a/b", "a/b/c", str(tmp_path))] == [None] * 6


def test_the_pattern_of_an_earlier_mask_does_not_stay(adapter, checkpoint):
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig(n=4, m=8)).save_pretrained(adapter)
    assert ModelCard.load(adapter / "README.md").data.tags == ["peft", "maskpro", "n-m-sparsity", "4:8"]


def test_models_whose_class_says_otherwise_what_they_are(tmp_path):
    get_peft_model(tiny_gpt2(), MaskProConfig()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert 'base = AutoModelForCausalLM.from_pretrained("path/to/the/base")' in card.text


def test_every_stage_is_told(adapter, checkpoint):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "maskpro_theta" in name:
            torch.nn.init.normal_(parameter, std=10)
    model.save_pretrained(adapter)
    text = ModelCard.load(adapter / "README.md").text
    assert "| 1 | magnitude | my.txt, 2,048 tokens |" in text
    assert "| 2 | adapter |" in text


def test_saving_what_was_loaded_changes_nothing(adapter, checkpoint):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).save_pretrained(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_readme_that_is_no_card(adapter, checkpoint):
    (adapter / "README.md").write_bytes(b"---\na: [\n---\n\xff")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    with pytest.raises(ValueError, match="is no model card"):
        model.save_pretrained(adapter)


def test_names_that_no_folder_can_have():
    assert hub_id("me/" + "x" * 300) is None
    assert hub_id("me/\0") is None


def test_layers_are_sorted_by_numbers_alone():
    """A superscript is a digit, and no number."""
    assert sorted(["a.10.b", "a.9.b", "a.²"], key=_by_number) == ["a.²", "a.9.b", "a.10.b"]
