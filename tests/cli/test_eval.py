import json
from shutil import copytree

import pytest
from huggingface_hub import ModelCard

from hf_maskpro.cli.common import load_model
from hf_maskpro.evaluation import perplexity

from .test_cli import adapter, fails, run


__all__ = ["adapter"]


@pytest.fixture(scope="session")
def merged(checkpoint, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "merged"
    run("merge", "--model", checkpoint, "--adapter", adapter, "--output", folder)
    return folder


def measured(*arguments):
    return json.loads(run("eval", *arguments, "--json").stdout)


def test_protocols(checkpoint, text):
    eval = ["--model", checkpoint, "--text", text, "--seq-len", 32, "--max-tokens", 500]
    apart, overlapping = measured(*eval), measured(*eval, "--stride", 8)
    assert apart["protocol"] == f"{text}, non-overlapping windows of 32 tokens, 480 tokens"
    assert overlapping["protocol"] == f"{text}, windows of 32 tokens at a stride of 8, 500 tokens"
    expected = perplexity(*load_model(str(checkpoint)), text.read_text(), 32, 500, stride=8)
    assert overlapping["perplexity"] == expected != apart["perplexity"]
    assert measured(*eval, "--batch-size", 4)["perplexity"] == pytest.approx(apart["perplexity"], rel=1e-6)
    printed = run("eval", *eval).stdout
    assert "non-overlapping windows of 32 tokens" in " ".join(printed.replace("│", " ").split())


def test_the_test_split_of_a_dataset(checkpoint, tmp_path):
    documents = {"train": "w1 w2 " * 300, "test": "w3 w4 w5 " * 300}
    for split, document in documents.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": document}))
    (tmp_path / "held_out.txt").write_text(documents["test"])
    measure = ["eval", "--model", checkpoint, "--json"]
    figures = json.loads(run(*measure, "--dataset", tmp_path).stdout)
    same = json.loads(run(*measure, "--text", tmp_path / "held_out.txt").stdout)
    assert figures["perplexity"] == same["perplexity"]
    assert figures["protocol"] == f"{tmp_path}, non-overlapping windows of 512 tokens, 512 tokens"


def test_the_papers_windows_on_request(starting_checkpoint, text):
    eval = ["--model", starting_checkpoint, "--text", text, "--seq-len", 32, "--max-tokens", 500]
    begun, papers = measured(*eval), measured(*eval, "--no-start-token")
    model, content = load_model(str(starting_checkpoint)), text.read_text()
    assert begun["perplexity"] == perplexity(*model, content, 32, 500)
    assert papers["perplexity"] == perplexity(*model, content, 32, 500, start_token=False) != begun["perplexity"]
    assert begun["protocol"].endswith("windows of 32 tokens, each from the start token on, 496 tokens")
    assert papers["protocol"].endswith("windows of 32 tokens, 480 tokens")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """Two texts of other kinds than the one that masks are learned from."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, step in (("verse.txt", 5), ("prose.txt", 11)):
        (folder / name).write_text(" ".join(f"w{step * i * i % 32}" for i in range(300)))
    return [folder / "verse.txt", folder / "prose.txt"]


def test_a_mask_at_home_and_elsewhere(checkpoint, adapter, text, elsewhere):
    eval = ["--model", checkpoint, "--seq-len", 32, "--max-tokens", 200]
    given = ["--text", elsewhere[0], "--text", elsewhere[1], "--home", text]
    figures = measured(*eval, "--adapter", adapter, *given)
    assert list(figures["texts"]) == [str(path) for path in (*elsewhere, text)]
    for path, each in figures["texts"].items():
        assert each["perplexity"] == measured(*eval, "--adapter", adapter, "--text", path)["perplexity"]
        assert each["dense_perplexity"] == measured(*eval, "--text", path)["perplexity"] != each["perplexity"]
        assert each["ratio"] == each["perplexity"] / each["dense_perplexity"]
        assert each["protocol"] == f"{path}, non-overlapping windows of 32 tokens, 192 tokens"
    verse, prose, home = (each["ratio"] for each in figures["texts"].values())
    assert figures["at_home"] == home
    assert figures["elsewhere"] == pytest.approx((verse * prose) ** 0.5)
    printed = run("eval", *eval, "--adapter", adapter, *given).stdout
    (row,) = (line for line in printed.splitlines() if "│ ratio" in line)
    assert [float(cell) for cell in row.split("│")[2:5]] == pytest.approx([verse, prose, home], rel=1e-3)
    assert printed.count("Perplexity: ") == 3


def test_texts_of_one_name_have_figures_of_their_own(checkpoint, adapter, text, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    copytree(adapter, tmp_path / "a")
    for folder, path in zip(("verse", "prose"), elsewhere, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_bytes(path.read_bytes())
    given = ["--text", tmp_path / "verse" / "text.txt", "--text", tmp_path / "prose" / "text.txt", "--home", text]
    eval = ["eval", "--model", checkpoint, "--seq-len", 32, "--max-tokens", 100, *given]
    printed = run(*eval, "--adapter", tmp_path / "a", "--record").stdout
    card = ModelCard.load(tmp_path / "a" / "README.md")
    figures = {each.dataset_type: each for each in card.data.eval_results if each.metric_type == "perplexity"}
    home = f"{text.parent.name}/text.txt"
    assert figures.keys() == {"verse/text.txt", "prose/text.txt", home}
    assert len({each.metric_value for each in figures.values()}) == 3
    compared = run(*eval, "--compare", checkpoint, checkpoint).stdout
    for name in ("verse/text.txt", "prose/text.txt"):
        assert name in printed
        assert name in compared


def test_one_text_is_neither_at_home_nor_elsewhere(checkpoint, adapter, text):
    eval = ["--model", checkpoint, "--adapter", adapter, "--seq-len", 32]
    plain, home = measured(*eval, "--text", text), measured(*eval, "--home", text)
    assert home == plain | {"at_home": plain["ratio"]}
    assert plain.keys() == {"model", "adapter", "perplexity", "dense_perplexity", "ratio", "kl", "protocol"}


def test_adapters_in_subfolders_are_compared(checkpoint, adapter, text, tmp_path):
    copytree(adapter, tmp_path / "masks" / "first")
    compare = ["--compare", checkpoint, tmp_path / "masks", "--model", checkpoint, "--text", text, "--seq-len", 32]
    assert measured(*compare, "--subfolder", "first")["models"][1]["adapter"] == str(tmp_path / "masks")
    compare[2] = adapter
    assert f"pass --subfolder with a folder of {adapter}" in fails("eval", *compare, "--subfolder", "none")


def test_several_texts_of_models_without_an_adapter(checkpoint, adapter, merged, text, elsewhere):
    given = ["--text", elsewhere[0], "--text", text, "--seq-len", 32]
    sparse = measured("--model", merged, *given)
    assert [each.keys() for each in sparse["texts"].values()] == 2 * [{"perplexity", "protocol"}]
    assert "elsewhere" not in sparse
    compare = ["--compare", checkpoint, adapter, "--model", checkpoint, *given]
    dense, masked = measured(*compare)["models"]
    assert masked["texts"] == sparse["texts"]
    printed = run("eval", *compare).stdout
    for path in (elsewhere[0], text):
        (row,) = (line for line in printed.splitlines() if f"{path.name} perplexity" in line)
        expected = [each["texts"][str(path)]["perplexity"] for each in (dense, masked)]
        assert [float(cell) for cell in row.split("│")[2:4]] == pytest.approx(expected, rel=1e-3)


def test_both_columns_go_into_the_card(checkpoint, adapter, text, elsewhere, tmp_path):
    copytree(adapter, tmp_path / "a")
    eval = ["--model", checkpoint, "--adapter", tmp_path / "a", "--seq-len", 32, "--max-tokens", 200, "--record"]
    figures = measured(*eval, "--text", elsewhere[0], "--text", elsewhere[1], "--home", text)
    results = {
        (result.dataset_name, result.metric_type): (result.metric_value, result.dataset_config)
        for result in ModelCard.load(tmp_path / "a" / "README.md").data.eval_results
    }
    protocol = "non-overlapping windows of 32 tokens, 192 tokens"
    assert results == {
        (path.name, "perplexity"): (figures["texts"][str(path)]["perplexity"], protocol) for path in (*elsewhere, text)
    } | {
        ("text.txt", "times dense, at home"): (figures["at_home"], protocol),
        ("verse.txt, prose.txt", "times dense, elsewhere"): (figures["elsewhere"], protocol),
    }


def test_tasks_whose_data_cannot_be_had(checkpoint, text, task, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hf_maskpro.evaluation.perplexity", None)
    (tmp_path / "away.yaml").write_text(task.read_text().replace("dataset_path: json", "dataset_path: me/rows"))
    assert "me/rows" in fails("eval", "--model", checkpoint, "--text", text, "--tasks", tmp_path / "away.yaml")


def test_a_task_file_that_is_none(checkpoint, tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    assert f"{tmp_path / 'list.yaml'} cannot be read" in fails(
        "eval", "--model", checkpoint, "--tasks", tmp_path / "list.yaml"
    )


def test_tasks_of_a_file(checkpoint, adapter, merged, task):
    dense, masked, sparse = (
        measured("--model", *model, "--tasks", task)["tasks"]
        for model in ((checkpoint,), (checkpoint, "--adapter", adapter), (merged,))
    )
    assert masked == sparse
    assert 0 < masked["order"]["acc"] < 1
    assert dense.keys() == sparse.keys() == {"order"}
    assert "order acc " in run("eval", "--model", merged, "--tasks", task, "--limit", 4).stdout


def test_models_side_by_side(checkpoint, adapter, merged, text, task):
    compare = ["--compare", checkpoint, adapter, merged, "--model", checkpoint, "--text", text, "--seq-len", 32]
    dense, masked, sparse = measured(*compare, "--tasks", task, "--limit", 4)["models"]
    assert [(row["model"], row["adapter"]) for row in (dense, masked, sparse)] == [
        (str(checkpoint), None),
        (str(checkpoint), str(adapter)),
        (str(merged), None),
    ]
    assert dense["perplexity"] != masked["perplexity"] == sparse["perplexity"]
    assert masked["tasks"] == sparse["tasks"]
    assert dense["limit"] == 4
    assert dense["perplexity"] == measured("--model", checkpoint, "--text", text, "--seq-len", 32)["perplexity"]
    lines = run("eval", *compare).stdout.splitlines()
    (row,) = (line for line in lines if "perplexity" in line)
    assert [float(cell) for cell in row.split("│")[2:5]] == [
        pytest.approx(each["perplexity"], rel=1e-3) for each in (dense, masked, sparse)
    ]
    assert sum(line.startswith("Perplexity: ") for line in lines) == 1


def test_bad_input(checkpoint, adapter, text, tmp_path, monkeypatch):
    eval = ["eval", "--text", text, "--seq-len", 32]
    assert "no model to measure" in fails(*eval)
    assert "text.txt is both --home and --text" in fails(*eval, "--model", tmp_path / "no", "--home", text)
    assert "no.txt does not exist" in fails(*eval, "--model", tmp_path / "no", "--text", tmp_path / "no.txt")
    assert "--compare to compare several" in fails(*eval, checkpoint)
    assert "two or more" in fails(*eval, "--compare", checkpoint)
    assert "no --adapter" in fails(*eval, "--compare", checkpoint, checkpoint, "--adapter", adapter)
    assert "is an adapter; pass its base model with --model" in fails(*eval, "--compare", checkpoint, adapter)
    assert "error" in fails(*eval, "--compare", checkpoint, tmp_path / "no")
    # Before a model is loaded, since there is nothing to load.
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    compare = ["--compare", checkpoint, tmp_path / "lora", "--model", tmp_path / "hollow"]
    assert "lora is a LORA adapter, not a mask adapter" in fails(*eval, *compare)
    assert "--stride is 32, outside 1 to --seq-len - 1 = 31" in fails(*eval, "--model", checkpoint, "--stride", 32)
    assert "nonsense is neither a task" in fails("eval", "--model", checkpoint, "--tasks", "nonsense")
