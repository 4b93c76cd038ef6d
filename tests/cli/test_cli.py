"""The command as a user types it."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from shutil import copy, copytree, rmtree
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import check_sparsity, initialize_masks
from hf_maskpro.cli import main
from hf_maskpro.cli.common import load_adapter, load_model, load_to_run
from hf_maskpro.evaluation import windows
from hf_maskpro.learning import MaskProTrainer
from hf_maskpro.starts import random_windows

from ..conftest import save_tiny_model, tiny_gpt2, tiny_llama
from ..starts.test_sources import by_parameter, maskllm, masks_of


@pytest.fixture(autouse=True, scope="session")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def run(*arguments, code=0):
    """Run the command in this process, which spares the seconds of its imports; `code`: of its exit, or several."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["hf-maskpro", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
    assert status in (code if isinstance(code, tuple) else (code,)), err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def fails(*arguments):
    """The one line on stderr of a command that fails."""
    last = run(*arguments, code=1).stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="session")
def adapter(checkpoint, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "adapter"
    run("init", "--model", checkpoint, "--method", "wanda", "--text", text, "--seq-len", 16, "--output", folder)
    return folder


def test_init_eval_train_merge_inspect(checkpoint, text, adapter, tmp_path):
    measure = ["eval", "--model", checkpoint, "--text", text, "--seq-len", 32, "--json"]
    dense = json.loads(run(*measure).stdout)
    wanda = json.loads(run(*measure, "--adapter", adapter).stdout)
    assert dense["perplexity"] != wanda["perplexity"]
    assert "windows of 32 tokens" in wanda["protocol"]
    calibration = json.loads((adapter / "adapter_config.json").read_text())["lineage"][0]["calibration"]
    made = {"text": "text.txt", "seed": 42, "start_token": False, "chat": False}
    assert calibration == {"sequences": 128, "tokens": 2048} | made

    learned = tmp_path / "learned"
    train = ["train", "--model", checkpoint, "--adapter", adapter, "--text", text, "--seq-len", 32, "--max-steps", 20]
    train += ["--save-steps", 10, "--output", learned]
    figures = json.loads(run(*train, "--json").stdout)
    assert figures["steps"] == 20
    simple = json.loads(run(*measure, "--adapter", learned).stdout)
    assert simple["perplexity"] < wanda["perplexity"]
    assert (learned / "checkpoint-20").is_dir()

    report = json.loads(run("inspect", learned, "--json").stdout)
    assert report["pattern"] == "2:4"
    assert report["layers"] == 14
    assert report["started_from"] == ["wanda", "adapter"]
    assert report["groups_changed"][1] > 0

    merged = tmp_path / "merged"
    run("merge", "--model", checkpoint, "--adapter", learned, "--output", merged)
    assert json.loads(run("inspect", merged, "--json").stdout)["zeros"] == pytest.approx(0.5)
    assert json.loads(run("inspect", checkpoint, "--json").stdout)["pattern"] is None
    assert "None" not in run("inspect", checkpoint).stdout
    again = json.loads(run("eval", "--model", merged, "--text", text, "--seq-len", 32, "--json").stdout)
    assert again["perplexity"] == simple["perplexity"]
    assert AutoModelForCausalLM.from_pretrained(merged).config.tie_word_embeddings
    check_sparsity(merged, 2, 4)


def test_results_go_into_the_card(checkpoint, text, adapter, tmp_path):
    copytree(adapter, tmp_path / "a")
    measure = ["eval", "--model", checkpoint, "--text", text, "--seq-len", 32, "--record", "--json"]
    figures = json.loads(run(*measure, "--adapter", tmp_path / "a").stdout)
    (result,) = ModelCard.load(tmp_path / "a" / "README.md").data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "text.txt",
        "perplexity",
        figures["perplexity"],
    )
    assert result.dataset_config == "non-overlapping windows of 32 tokens, 1984 tokens"
    assert "pass one with --adapter" in fails(*measure)


@pytest.mark.parametrize("estimator", ["residual", "simple"])
def test_train_resumes_where_it_stopped(checkpoint, text, tmp_path, estimator):
    def train(output, *more):
        run(
            "train", "--model", checkpoint, "--text", text, "--seq-len", 32, "--estimator", estimator,
            "--max-steps", 6, "--save-steps", 3, "--logit-scale", 2, "--output", output, *more,
        )  # fmt: skip

    train(tmp_path / "whole")
    train(tmp_path / "resumed")
    rmtree(tmp_path / "resumed" / "checkpoint-6")
    (tmp_path / "resumed" / "adapter_model.safetensors").unlink()
    train(tmp_path / "resumed", "--resume")
    whole = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors")
    resumed = load_file(tmp_path / "resumed" / "checkpoint-6" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "theta" in name)
    final = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert all(name.endswith("maskpro_mask") for name in final)


def test_resuming_with_another_pattern_is_refused(checkpoint, text, tmp_path):
    train = ["train", "--model", checkpoint, "--text", text, "--seq-len", 32, "--max-steps", 2, "--save-steps", 1]
    run(*train, "--n", 1, "--output", tmp_path / "a")
    assert "n is 3, and 1 in" in fails(*train, "--n", 3, "--output", tmp_path / "a", "--resume")
    run(*train, "--output", tmp_path / "a", "--resume")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["n"] == 1
    assert config["lineage"][0]["calibration"]["tokens"] == 128 * 256


def test_resuming_another_run_is_refused(checkpoint, text, adapter, tmp_path):
    run("init", "--model", checkpoint, "--method", "random", "--output", tmp_path / "other")
    train = ["train", "--model", checkpoint, "--text", text, "--seq-len", 32, "--save-steps", 1, "--json"]
    train += ["--output", tmp_path / "a", "--adapter"]
    run(*train, adapter, "--max-steps", 2)

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}

    before = files()
    assert "was begun from another mask" in fails(*train, tmp_path / "other", "--max-steps", 2, "--resume")
    assert "--max-steps is 1, and" in fails(*train, adapter, "--max-steps", 1, "--resume")
    assert files() == before


def test_a_run_that_has_its_steps_takes_no_more(checkpoint, text, tmp_path):
    train = ["train", "--model", checkpoint, "--text", text, "--seq-len", 32, "--logit-scale", 2, "--json"]
    train += ["--max-steps", 2, "--logging-steps", 1, "--output", tmp_path / "a"]
    first = json.loads(run(*train).stdout)
    learned = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    again = json.loads(run(*train, "--resume").stdout)
    assert again["steps"] == 2
    assert again["loss"] == first["loss"]
    masks = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(torch.equal(masks[name], mask) for name, mask in learned.items())
    assert not (tmp_path / "a" / "checkpoint-3").exists()


@pytest.mark.parametrize("method", ["ria", "sparsegpt", "gblm", "pruner-zero", "magnitude+swaps"])
def test_init_by_every_rule(checkpoint, text, tmp_path, method):
    init = ["init", "--model", checkpoint, "--text", text, "--seq-len", 16, "--samples", 8]
    report = run(*init, "--method", method, "--output", tmp_path / "a").stdout
    assert f"a 2:4 mask by {method} over" in report
    lineage = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lineage"]
    assert lineage[0]["init_mask"] == method
    assert lineage[0]["calibration"]["tokens"] == 128


def test_init_on_text_that_the_model_generates(checkpoint, tmp_path):
    init = ["init", "--model", checkpoint, "--self-generated", "--seq-len", 16, "--samples", 40]
    run(*init, "--output", tmp_path / "a")
    lineage = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lineage"]
    assert lineage[0]["calibration"] == {
        "sequences": 40,
        "tokens": 640,
        "text": "generated by the model",
        "seed": 42,
        "start_token": False,
        "chat": False,
    }


def test_windows_begin_as_the_tokenizer_begins_a_text(checkpoint, starting_checkpoint, text, tmp_path, monkeypatch):
    """In calibration and in training, unless the papers' windows are asked for; elsewhere nothing changes."""
    seen, train = [], MaskProTrainer.train

    def calibrated(model, batches):
        seen.append(batches)
        initialize_masks(model, batches)

    def trained(trainer, **options):
        seen.append(trainer.train_dataset)
        return train(trainer, **options)

    monkeypatch.setattr("hf_maskpro.cli.common.initialize_masks", calibrated)
    monkeypatch.setattr(MaskProTrainer, "train", trained)

    def windows_of(verb, base, *options):
        seen.clear()
        run(
            verb, "--model", base, "--text", text, "--seq-len", 16, "--output", tmp_path / "a", "--overwrite", *options
        )
        return [torch.cat([row["input_ids"].view(-1, row["input_ids"].shape[-1]) for row in rows]) for rows in seen]

    start = AutoTokenizer.from_pretrained(starting_checkpoint).bos_token_id
    known = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(text.read_text()).input_ids)
    for verb, options in (("init", []), ("train", ["--max-steps", 1])):
        begun = windows_of(verb, starting_checkpoint, *options)
        plain = windows_of(verb, checkpoint, *options)
        papers = windows_of(verb, starting_checkpoint, *options, "--no-start-token")
        assert len(begun) == len(plain) == len(papers) == (1 if verb == "init" else 2)
        assert all((each[:, 0] == start).all() and not (each[:, 1:] == start).any() for each in begun)
        assert [each.shape[-1] for each in begun] == [each.shape[-1] for each in plain]
        assert not any((each == start).any() for each in plain)
        assert all((each == start).any() and not (each[:, 0] == start).all() for each in papers[1:])
    assert torch.equal(plain[1], known.view(-1, 16))
    assert torch.equal(begun[1][:, 1:].flatten(), known[: len(known) // 15 * 15])
    init = ["init", "--model", checkpoint, "--self-generated", "--no-start-token", "--output", tmp_path / "b"]
    assert "drop --self-generated or --chat and --no-start-token" in fails(*init)


def test_a_text_as_conversations(starting_checkpoint, tmp_path, monkeypatch):
    seen = []

    def calibrated(model, batches):
        seen.extend(batches)
        initialize_masks(model, batches)

    monkeypatch.setattr("hf_maskpro.cli.common.initialize_masks", calibrated)
    base, text = tmp_path / "base", tmp_path / "text.txt"
    copytree(starting_checkpoint, base)
    text.write_text("w1 w2\n\nw3\n\n\n\nw4\n\nw5 w6\n\nw7")
    init = ["init", "--model", base, "--chat", "--seq-len", 12, "--samples", 1, "--output", tmp_path / "a"]
    assert "has no chat template; drop --chat" in fails(*init, "--text", text)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %} {{ {'user': 'w30', 'assistant': 'w31'}[turn.role] }} "
        "{{ turn.content }}{% endfor %} "
    )
    tokenizer.save_pretrained(base)
    run(*init, "--text", text)
    assert tokenizer.decode(seen[0]["input_ids"][0]) == "<pad> w30 w1 w2 w31 w3 <pad> w30 w4 w31 w5 w6"


def test_settings_of_the_sources(checkpoint, text, tmp_path, monkeypatch):
    init = ["init", "--model", checkpoint, "--source-settings", "--output", tmp_path / "a", "--text"]
    assert "2000 tokens, fewer than one window of 2048" in fails(*init, text)
    assert "drop the one or the other" in fails(*init, text, "--samples", 8)
    (tmp_path / "long.txt").write_text(2 * text.read_text())
    asked = []

    def few_windows(ids, samples, seq_len, seed, start_token):
        asked.append((samples, seq_len))
        return random_windows(ids, 2, 16, seed)

    monkeypatch.setattr("hf_maskpro.cli.common.random_windows", few_windows)
    run(*init, tmp_path / "long.txt")
    assert asked == [(128, 2048)]


def test_import(checkpoint, adapter, tmp_path, monkeypatch):
    def imported(source, name):
        run("import", source, "--model", checkpoint, "--output", tmp_path / name)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    known = (adapter / "adapter_model.safetensors").read_bytes()
    assert imported(adapter, "a") == known
    run("merge", "--model", checkpoint, "--adapter", adapter, "--output", tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    assert imported("merged", "b") == known
    for rule in ("magnitude", "wanda", "./merged+swaps"):
        line = fails("import", rule, "--model", checkpoint, "--output", tmp_path / "c")
        assert f"use hf-maskpro init --method {rule}" in line
    assert "nothing does not exist" in fails("import", "nothing", "--model", checkpoint, "--output", tmp_path / "c")
    given = ["--model", checkpoint, "--output", tmp_path / "c"]
    assert fails("import", adapter, "--n", 1, *given).endswith("the adapter 1:4; pass --n 2 and --m 4.")
    missing = tmp_path / "missing.npz"
    assert "does not exist" in fails("import", missing, "--model", checkpoint, "--output", tmp_path / "c")
    assert "groups do not keep 1 of 4" in fails(
        "import", "merged", "--n", 1, "--model", checkpoint, "--output", tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


def test_import_of_files(checkpoint, adapter, tmp_path):
    masked = load_adapter(load_model(str(checkpoint))[0], adapter)
    layers = by_parameter(masked, masks_of(masked))
    save_file(layers, tmp_path / "masks.safetensors")
    maskllm(tmp_path / "masks.npz", layers)
    for file in ("masks.safetensors", "masks.npz"):
        run("import", tmp_path / file, "--model", checkpoint, "--output", tmp_path / file.replace(".", "-"))
        written = (tmp_path / file.replace(".", "-") / "adapter_model.safetensors").read_bytes()
        assert written == (adapter / "adapter_model.safetensors").read_bytes()
    whole = (tmp_path / "masks.npz").read_bytes()
    for broken in (b"", whole[:-100], whole[: len(whole) // 2], b"nonsense"):
        (tmp_path / "broken.npz").write_bytes(broken)
        line = fails("import", tmp_path / "broken.npz", "--model", checkpoint, "--output", tmp_path / "c")
        assert "broken.npz is not a whole .npz file" in line
    middle = bytearray(whole)
    middle[200:260] = bytes(60)
    (tmp_path / "broken.npz").write_bytes(middle)
    assert "cannot be read" in fails(
        "import", tmp_path / "broken.npz", "--model", checkpoint, "--output", tmp_path / "c"
    )


def test_export(checkpoint, adapter, tmp_path):
    export = ["export", "--model", checkpoint, "--output", tmp_path / "a", "--target"]
    assert "pass --adapter" in fails(*export, "dense")
    run("merge", "--model", checkpoint, "--adapter", adapter, "--output", tmp_path / "merged")
    figures = json.loads(run(*export, "dense", "--adapter", adapter, "--json").stdout)
    assert figures == {"output": str(tmp_path / "a"), "target": "dense", "layers": 14, "zeros": 0.5}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "merged")]
    assert weights[0] == weights[1]
    assert "is not empty" in fails(*export, "onnx")


@pytest.mark.parametrize("merged", [True, False])
def test_export_to_onnx(checkpoint, adapter, tmp_path, merged):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export = ["export", "--output", tmp_path / "a", "--target", "onnx", "--json"]
    if merged:
        run("merge", "--model", checkpoint, "--adapter", adapter, "--output", tmp_path / "merged")
        figures = json.loads(run(*export, "--model", tmp_path / "merged").stdout)
    else:
        figures = json.loads(run(*export, "--model", checkpoint, "--adapter", adapter).stdout)
    assert figures["layers"] == 14
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_another_methods_adapter_is_merged_when_asked_for(checkpoint, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    get_peft_model(base, LoraConfig(init_lora_weights=False)).save_pretrained(tmp_path / "lora")
    merge = ["merge", "--model", checkpoint, "--adapter", tmp_path / "lora", "--output", tmp_path / "merged"]
    assert "would make it dense again" in fails(*merge)
    for target in ("cpu", "onnx", "dense"):
        assert "would make it dense again" in fails("export", "--target", target, *merge[1:])
    assert not (tmp_path / "merged").exists()
    run(*merge, "--allow-dense")
    assert json.loads(run("inspect", tmp_path / "merged", "--json").stdout)["pattern"] is None


def test_export_to_cpu(checkpoint, adapter, tmp_path):
    export = ["export", "--target", "cpu", "--output", tmp_path / "a", "--adapter", adapter, "--model"]
    assert "no layer can be packed" in fails(*export, checkpoint)
    assert not (tmp_path / "a").exists()
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "half")
    figures = json.loads(run(*export, tmp_path / "half", "--json").stdout)
    # Of the tiny model only the two down projections have 32 inputs.
    assert figures == {"output": str(tmp_path / "a"), "target": "cpu", "layers": 2, "dense_layers": 13}
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_residual_lowers_the_training_loss(checkpoint, text, tmp_path):
    base, adapter, learned = (tmp_path / name for name in ("base", "adapter", "learned"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    inputs = windows(tokenizer, text.read_text(), 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    def measure(folder):
        command = ["eval", "--model", base, "--adapter", folder, "--text", text, "--seq-len", 32, "--json"]
        return json.loads(run(*command).stdout)["perplexity"]

    run("init", "--model", base, "--method", "random", "--output", adapter)
    run(
        "train", "--model", base, "--adapter", adapter, "--text", text, "--seq-len", 32, "--estimator", "residual",
        "--max-steps", 200, "--learning-rate", 3, "--logit-scale", 3, "--per-device-train-batch-size", 32,
        "--explored-groups", 10_000, "--save-steps", 200, "--output", learned,
    )  # fmt: skip
    assert measure(learned) < 0.6 * measure(adapter)


def test_a_starting_mask_is_a_folder_by_its_bare_name(checkpoint, adapter, text, tmp_path, monkeypatch):
    copytree(adapter, tmp_path / "mask")
    monkeypatch.chdir(tmp_path)
    given = ["--model", checkpoint, "--text", text, "--seq-len", 16]
    run("init", *given, "--method", "mask+swaps", "--samples", 8, "--output", "refined")
    run("train", *given, "--init-mask", "mask", "--max-steps", 1, "--output", "learned")
    for folder, source in ("refined", "./mask+swaps"), ("learned", "./mask"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["init_mask"] == source


def test_a_local_dataset(checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [None, *["w1 w2 w3 w4 " * 10] * 20])
    )
    run("init", "--model", checkpoint, "--dataset", data, "--seq-len", 16, "--output", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    calibration = config["lineage"][0]["calibration"]
    assert (calibration["sequences"], calibration["tokens"], calibration["text"]) == (128, 2048, "data")
    assert str(tmp_path) not in (tmp_path / "a" / "README.md").read_text()


def test_in_a_process_of_its_own(checkpoint):
    # As the installed script does.
    command = [sys.executable, "-c", "from hf_maskpro_cli import main; main()"]
    done = subprocess.run([*command, "inspect", str(checkpoint / "no")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert subprocess.run([*command, "train", "--nonsense"], capture_output=True).returncode == 2


def test_help_for_every_verb():
    verbs = "quickstart", "init", "import", "train", "eval", "merge", "export", "inspect", "push", "bench"
    for verb in verbs:
        assert "--help" in run(verb, "--help").stdout


class TestBadInput:
    """One line each, and nothing is written."""

    def test_patterns(self, checkpoint, tmp_path):
        init = ["init", "--model", checkpoint, "--method", "magnitude", "--output", tmp_path / "a"]
        assert "--n is 4, outside 1 to --m - 1 = 3" in fails(*init, "--n", 4, "--m", 4)
        assert "Invalid value for '--n'" in run(*init, "--n", 0, code=2).stderr
        assert "Invalid value for '--m'" in run(*init, "--m", 32, code=2).stderr
        line = fails(*init, "--m", 6)
        assert "in_features 16 is not a multiple of m = 6; exclude it with --exclude-modules" in line
        assert list(tmp_path.iterdir()) == []

    def test_missing_things(self, checkpoint, text, tmp_path):
        output = tmp_path / "a"
        missing = tmp_path / "no-such"
        assert f"{missing} does not exist" in fails(
            "init", "--model", checkpoint, "--text", missing, "--output", output
        )
        assert f"{missing} does not exist" in fails("init", "--model", missing, "--text", text, "--output", output)
        assert "error" in fails("init", "--model", "no/model", "--text", text, "--output", output)
        assert "one of --text FILE, --dataset NAME and --self" in fails(
            "init", "--model", checkpoint, "--output", output
        )
        assert "no whole checkpoint to resume from" in fails(
            "train", "--model", checkpoint, "--text", text, "--output", output, "--resume"
        )
        (tmp_path / "empty.txt").write_text("  \n")
        assert "is empty" in fails("eval", "--model", checkpoint, "--text", tmp_path / "empty.txt")
        assert "nothing to measure" in fails("eval", "--model", checkpoint)
        assert "drop them or drop --adapter" in fails(
            "train", "--model", checkpoint, "--adapter", "a", "--n", 1, "--text", text, "--output", output
        )
        assert f"{missing} does not exist" in fails("inspect", missing)
        assert f"{missing} does not exist" in fails("quickstart", "--model", missing, "--output", output)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text("")
        assert "error" in fails("init", "--model", checkpoint, "--dataset", tmp_path / "data", "--output", output)
        assert not output.exists()

    @pytest.mark.parametrize("damaged", ["config.json", "tokenizer_config.json", "tokenizer.json"])
    def test_a_damaged_model(self, checkpoint, text, tmp_path, damaged):
        copytree(checkpoint, tmp_path / "m")
        (tmp_path / "m" / damaged).write_text("[]")
        given = ["--model", tmp_path / "m", "--text", text]
        assert f"{tmp_path / 'm'} cannot be read" in fails("eval", *given)
        assert f"{tmp_path / 'm'} cannot be read" in fails("train", *given, "--output", tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_a_damaged_gguf_file(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        given = ["--model", tmp_path, "--gguf-file", "m.gguf", "--output", tmp_path / "a"]
        assert f"{tmp_path} cannot be read" in fails("init", *given, "--method", "magnitude")

    def test_a_short_text(self, checkpoint, tmp_path):
        (tmp_path / "short.txt").write_text("w1 w2")
        text = ["--text", tmp_path / "short.txt"]
        assert "2 tokens, fewer than one window" in fails("eval", "--model", checkpoint, *text)
        assert "fewer than one window" in fails("train", "--model", checkpoint, *text, "--output", tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_tokens_that_the_model_does_not_know(self, checkpoint, text, tmp_path):
        copytree(checkpoint, tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
        given = ["train", "--model", tmp_path / "m", "--text", text, "--seq-len", 16, "--output", tmp_path / "a"]
        assert "and the model a vocabulary of 20; tokenise with its tokenizer" in fails(*given)
        assert not (tmp_path / "a").exists()

    def test_folders_in_use(self, checkpoint, text, adapter, tmp_path):
        output = tmp_path / "a"
        output.mkdir()
        (output / "precious").write_text("x")
        for verb in (
            ["init", "--method", "magnitude"],
            ["train", "--text", text],
            ["merge", "--adapter", adapter],
        ):
            assert "is not empty; choose another output folder or pass --overwrite." in fails(
                *verb, "--model", checkpoint, "--output", output
            )
        assert [path.name for path in output.iterdir()] == ["precious"]
        run("init", "--method", "magnitude", "--model", checkpoint, "--output", output, "--overwrite")
        assert not (output / "precious").exists()

    def test_what_is_read_is_not_replaced(self, checkpoint, text, adapter, tmp_path):
        output = tmp_path / "a"
        run("import", adapter, "--model", checkpoint, "--output", output)
        copy(text, output / "text.txt")
        copytree(checkpoint, output / "base")
        before = sorted(output.rglob("*"))
        given = ["--output", output, "--overwrite"]
        for verb in (
            ["import", adapter, "--model", output / "base"],
            ["import", output, "--model", checkpoint],
            ["init", "--method", output, "--model", checkpoint],
            ["init", "--method", f"{output}+swaps", "--model", checkpoint, "--text", text],
            ["init", "--text", output / "text.txt", "--model", checkpoint],
            ["init", "--dataset", output, "--model", checkpoint],
            ["train", "--text", output / "text.txt", "--model", checkpoint],
            ["train", "--init-mask", output, "--text", text, "--model", checkpoint],
        ):
            assert "which would be lost" in fails(*verb, *given)
        assert sorted(output.rglob("*")) == before

    def test_windows_longer_than_the_positions(self, checkpoint, text, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_maskpro.cli.common.load_to_run", None)
        tiny_gpt2().save_pretrained(tmp_path / "gpt2")
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "gpt2")
        given = ["--model", tmp_path / "gpt2", "--text", text]
        for verb in (
            ["init", "--output", tmp_path / "a"],
            ["train", "--output", tmp_path / "a"],
            ["eval", "--seq-len", 512],
        ):
            assert "exceed the model's 64 positions; lower --seq-len" in fails(*verb, *given)

    def test_altered_adapters(self, checkpoint, text, adapter, tmp_path):
        tensors = load_file(adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        # It alone would tell.
        del config["masks_digest"]
        config = json.dumps(config)

        def altered(name, tensors, config=config, cut=0):
            folder = tmp_path / name
            folder.mkdir()
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            data = (folder / "adapter_model.safetensors").read_bytes()
            (folder / "adapter_model.safetensors").write_bytes(data[: len(data) - cut])
            (folder / "adapter_config.json").write_text(config)
            return folder

        first = next(iter(tensors))
        folders = {
            "out of range": altered("range", tensors | {first: torch.full_like(tensors[first], 240)}),
            "has no mask": altered("missing", {k: v for k, v in tensors.items() if k != first}),
            "rows": altered("rows", tensors | {first: tensors[first][:-1].clone()}),
            "bytes a row": altered("pattern", tensors, config.replace('"m": 4', '"m": 8')),
            "error": altered("truncated", tensors, cut=5),
        }
        for message, folder in folders.items():
            for verb in (["eval", "--text", text, "--seq-len", 16], ["merge", "--output", tmp_path / "out"]):
                assert message in fails(*verb, "--model", checkpoint, "--adapter", folder)
        assert "out of range" in fails("inspect", folders["out of range"])
        assert "has no mask" in fails("inspect", folders["has no mask"])
        assert "error" in fails("inspect", folders["error"])
        assert not (tmp_path / "out").exists()


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A CPU that has no instructions for it."""
    monkeypatch.setattr("hf_maskpro.cli.common.multiplies_in", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_bfloat16")
def test_a_model_runs_in_a_dtype_that_the_cpu_has_instructions_for(text, tmp_path):
    base = tmp_path / "base"
    save_tiny_model(base, dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    given = ["--model", base, "--text", text, "--seq-len", 16]
    told = "warning: this CPU has no instructions for torch.bfloat16; the model runs in float32"
    for verb in (["init", "--method", "wanda"], ["train", "--max-steps", 1, "--init-mask", "magnitude"]):
        assert run(*verb, *given, "--output", tmp_path / verb[0]).stderr.count(told) == 1
    evaluated = ["eval", "--adapter", tmp_path / "train", *given]
    assert run(*evaluated).stderr.count(told) == 1
    assert "no instructions" not in run(*evaluated, "--dtype", "bfloat16").stderr
    # What is written is the checkpoint's own.
    run("merge", "--model", base, "--adapter", tmp_path / "train", "--output", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    # A config need not say it.
    (base / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no instructions for torch.bfloat16"):
        assert load_to_run(str(base))[0].dtype == torch.float32


@pytest.mark.usefixtures("without_bfloat16")
def test_a_quantized_model_runs_in_what_it_was_made_for(monkeypatch):
    loaded = tiny_llama(dtype=torch.bfloat16)
    loaded.is_quantized = True
    monkeypatch.setattr("hf_maskpro.cli.common.load_model", lambda *_: (loaded, None))
    assert load_to_run("base") == (loaded, None)
    assert loaded.dtype == torch.bfloat16
