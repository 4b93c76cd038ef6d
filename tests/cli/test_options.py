"""What verbs have in common: a file of options, messages in the options' words, one object on stdout."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from shutil import copytree, rmtree
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.core import TyperCommand
from typer.main import get_command

from hf_maskpro import MaskProConfig, sparsify
from hf_maskpro.cli import app
from hf_maskpro.cli.train import forget_previous, put_back, set_aside
from hf_maskpro.cli.verb import in_options
from hf_maskpro.evaluation import mixed_windows
from hf_maskpro.learning import MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.starts import generated_text, random_windows

from ..conftest import save_tiny_model, tiny_mixtral
from .test_bench import pretended
from .test_cli import adapter, fails, run


__all__ = ["adapter", "pretended"]


@pytest.fixture
def train(checkpoint, text, tmp_path):
    given = ["train", "--model", checkpoint, "--text", text, "--seq-len", 32, "--max-steps", 2]
    return [*given, "--output", tmp_path / "a"]


@pytest.fixture
def arguments(monkeypatch):
    """The arguments of the runs that are made."""
    seen, begin = [], MaskProTrainer.__init__

    def watched(trainer, model, args, **options):
        seen.append(args)
        begin(trainer, model, args, **options)

    monkeypatch.setattr(MaskProTrainer, "__init__", watched)
    return seen


def test_every_verb_prints_one_object(checkpoint, text, train, pretended, monkeypatch, tmp_path):
    def noisy(verb, context, invoke=TyperCommand.invoke):
        print("what a library says")
        return invoke(verb, context)

    monkeypatch.setattr(TyperCommand, "invoke", noisy)

    def printed(*command):
        return json.loads(run(*command, "--json").stdout)

    given = ["--model", checkpoint, "--output"]
    assert printed("init", "--method", "magnitude", *given, tmp_path / "i")["init_mask"] == "magnitude"
    assert printed("import", tmp_path / "i", *given, tmp_path / "j")["pattern"] == "2:4"
    assert printed(*train, "--logging-steps", 1)["steps"] == 2
    assert printed("merge", "--adapter", tmp_path / "i", *given, tmp_path / "s")["layers"] == 14
    assert printed("inspect", tmp_path / "s")["pattern"] == "2:4"
    cut = ["--text", text, "--seq-len", 32]
    assert printed("eval", "--model", tmp_path / "s", *cut)["perplexity"] > 1
    exported = printed("export", "--target", "dense", "--adapter", tmp_path / "i", *given, tmp_path / "e")
    assert exported["target"] == "dense"
    timing = ["--prefill-tokens", 16, "--batch-size", 1, "--repeats", 1]
    assert len(printed("bench", "--model", tmp_path / "s", *timing)["rows"]) == 2
    commit = SimpleNamespace(repo_url=SimpleNamespace(repo_id="me/mask"), oid="1", commit_url="https://hub/1")
    monkeypatch.setattr("hf_maskpro.hub.push_folder", lambda *where, **options: commit)
    assert printed("push", tmp_path / "i", "me/mask")["repository"] == "me/mask"


def test_a_verb_ends_with_the_next_command(checkpoint, train, tmp_path):
    given = ["--model", checkpoint, "--output"]
    printed = run("init", "--method", "magnitude", *given, tmp_path / "i").stdout
    assert f"Next: hf-maskpro train --model {checkpoint} --adapter {tmp_path / 'i'} --text FILE" in printed
    assert f"Next: hf-maskpro eval --model {checkpoint} --adapter {tmp_path / 'a'}" in run(*train).stdout
    printed = run("merge", "--adapter", tmp_path / "i", *given, tmp_path / "s").stdout
    assert f"Next: hf-maskpro eval --model {tmp_path / 's'}" in printed


def test_tables_fold(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    folder = tmp_path / ("long" * 20)
    run("init", "--method", "magnitude", "--model", checkpoint, "--output", tmp_path / "i")
    printed = run("merge", "--model", checkpoint, "--adapter", tmp_path / "i", "--output", folder).stdout
    table = "".join(line.split("│")[2].strip() for line in printed.splitlines() if line.startswith("│"))
    assert str(folder) in table
    monkeypatch.setenv("COLUMNS", "24")
    assert (
        "…" not in run("merge", "--model", checkpoint, "--adapter", tmp_path / "i", "--output", tmp_path / "m").stdout
    )


def test_options_of_a_file(train, arguments, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "max_steps: 1\nseq-len: 16\nlearning_rate: 1e-2\nweight_decay: 0.5\nlr_scheduler_type: constant\n"
        "start_token: false\nbf16: false\nlr_scheduler_kwargs: {}\n"
        "optimizer_in_backward: true\ngradient_checkpointing: false\n"
        "objective: {distillation: 1, language-modeling: 2}\n"
    )
    run(*train, "--config", tmp_path / "run.yaml", "--weight-decay", "0.25", "--adam-beta1=0.8")
    (args,) = arguments
    assert (args.max_steps, args.learning_rate, args.weight_decay, args.adam_beta1) == (2, 0.01, 0.25, 0.8)
    assert args.lr_scheduler_type == "constant"
    assert not args.gradient_checkpointing
    training = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lineage"][-1]["training"]
    assert training["seq_len"] == 32
    assert training["objective"] == "1 distillation + 2 language-modeling"
    run(*train, "--gradient-checkpointing", "--overwrite")
    assert arguments[-1].gradient_checkpointing


def test_bad_files_of_options(train, tmp_path):
    file = tmp_path / "run.yaml"
    given = [*train, "--config", file]

    def refused():
        return " ".join(run(*given, code=2).stderr.replace("│", " ").split())

    assert "cannot be read" in refused()
    for content, line in (
        ("a: [", "is no YAML file"),
        ("- a", "holds no options"),
        ("max_step: 1", "No such option: --max-step. Did you mean --max-steps?"),
        ("weight_dcay: 1", "Did you mean --weight-decay?"),
    ):
        file.write_text(content)
        assert line in refused()
    file.write_text("weight_decay: much")
    assert "--weight-decay is much; give a number" in refused()
    file.write_text("eval_strategy: sometimes")
    assert "--eval-strategy: invalid choice: 'sometimes'" in fails(*given)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--weight-decay", "inf"], "--weight-decay is inf"),
        (["--adam-beta1", "2"], "--adam-beta1 is 2.0"),
        (["--fp16", "true"], "fp16 scales gradients"),
        (["--objective", "kl"], "--objective is 'kl'; use 'language-modeling', 'distillation', or a positive weight"),
        (["--estimator", "residual", "--masks-per-step", "0"], "--masks-per-step is 0"),
        (
            ["--estimator", "residual", "--optimizer-in-backward", "true"],
            "--optimizer-in-backward is for --estimator simple, not",
        ),
        (
            ["--lr-scheduler-type", "cosine", "--lr-scheduler-kwargs", '{"foo": 1}'],
            "--lr-scheduler-kwargs {'foo': 1} does not fit --lr-scheduler-type cosine: get_cosine_schedule",
        ),
        (["--lr-scheduler-kwargs", "foo"], "--lr-scheduler-kwargs foo does not fit --lr-scheduler-type polynomial"),
        (["--lr-scheduler-type", "warmup_stable_decay"], "--lr-scheduler-kwargs None does not fit"),
        (["--optim-args", "foo"], "--optim-args is 'foo'; write name=value, separated by commas"),
        (["--optim", "sgd", "--optim-args", "momentum=much"], "--optim-args is 'momentum=much'; write name=value"),
        (
            ["--load-best-model-at-end", "--save-strategy", "epoch", "--eval-text", "TEXT"],
            "--load-best-model-at-end requires the save and eval strategy to match, except when --save-strategy best, "
            "but found - Evaluation strategy:",
        ),
        (["--eval-strategy", "steps"], "--eval-strategy steps needs a text to evaluate on: pass --eval-text FILE."),
        (["--masks-per-step", "2"], "--masks-per-step 2 is for --estimator residual, not simple; drop it"),
        (["--estimator", "maskllm", "--prox-pull", "1"], "--prox-pull 1.0 is for --estimator proxsparse, not maskllm"),
    ],
)
def test_values_are_checked_before_the_model_is_loaded(train, text, monkeypatch, tmp_path, options, line):
    monkeypatch.setattr("hf_maskpro.cli.common.load_tokenizer", None)
    assert line in fails(*train, *(text if option == "TEXT" else option for option in options))
    assert not (tmp_path / "a").exists()


def test_layers_by_name(checkpoint, text, train, tmp_path):
    def layers(*options):
        run(*options)
        return set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lineage"][-1]["groups_changed"])

    init = ["init", "--method", "magnitude", "--model", checkpoint, "--output", tmp_path / "a", "--overwrite"]
    chosen = layers(*init, "--target-modules", "q_proj,mlp.down_proj")
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "down_proj"}
    assert all(
        name.startswith("model.layers.1.") for name in layers(*init, "--target-modules", r".*layers\.1\..*proj")
    )
    learned = layers(*train, "--exclude-modules", "q_proj,k_proj", "--overwrite")
    assert {name.rpartition(".")[2] for name in learned} == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "--target-modules" in fails(*train, "--overwrite", "--adapter", tmp_path, "--target-modules", "q_proj")
    assert layers(*train, "--resume", "--max-steps", 3) == learned


@pytest.mark.parametrize("option", ["--target-modules", "--exclude-modules"])
def test_layers_that_are_not_there(checkpoint, adapter, train, tmp_path, option):
    given = ["--model", checkpoint, "--output", tmp_path / "a", option]
    init, imported = ["init", "--method", "magnitude", *given], ["import", adapter, *given]
    for command in (init, imported, [*train, option]):
        line = fails(*command, "k_proj,q_prjo")
        assert line.startswith(f"error: {option} q_prjo matches no layer of {checkpoint}; ")
        assert line.endswith(" Did you mean q_proj?")
    assert f"{option} .*layers[2].* matches no layer of {checkpoint}; " in fails(*init, ".*layers[2].*")
    assert not (tmp_path / "a").exists()


def test_experts_by_name(checkpoint, text, tmp_path):
    base = copytree(checkpoint, tmp_path / "base")
    tiny_mixtral(layers=1).save_pretrained(base)

    def masked(folder):
        return set(json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"])

    given = ["--model", base, "--target-modules", "q_proj", "--target-parameters", "experts.down_proj", "--output"]
    named = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"}
    run("init", "--method", "magnitude", *given, tmp_path / "i")
    assert masked(tmp_path / "i") == named
    run("import", tmp_path / "i", *given, tmp_path / "j")
    assert masked(tmp_path / "j") == named
    train = ["train", "--init-mask", "magnitude", "--text", text, "--seq-len", 32, "--max-steps", 1, *given]
    run(*train, tmp_path / "t")
    assert masked(tmp_path / "t") == named
    alone = ["--model", base, "--target-parameters", "experts.down_proj", "--output", tmp_path / "k"]
    run("init", "--method", "magnitude", *alone)
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert masked(tmp_path / "k") == {*attention, "model.layers.0.mlp.experts.down_proj"}
    left = ["--model", base, "--exclude-modules", "experts.down_proj", "--output", tmp_path / "l"]
    run("init", "--method", "magnitude", *left)
    assert masked(tmp_path / "l") == {*attention, "model.layers.0.mlp.experts.gate_up_proj"}
    assert "--target-parameters" in fails(*train, tmp_path / "u", "--adapter", tmp_path / "i")


def test_layers_that_m_does_not_divide(text, tmp_path):
    save_tiny_model(tmp_path / "base", intermediate_size=40)

    def masked(*command):
        run(*command, "--on-indivisible", "dense", "--overwrite")
        known = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_fingerprint"]
        return {name.rpartition(".")[2] for name in known}

    given = ["--model", tmp_path / "base", "--n", 2, "--m", 5, "--output", tmp_path / "a"]
    init = ["init", "--method", "magnitude", *given]
    assert fails(*init).endswith("exclude it with --exclude-modules, or all such layers by --on-indivisible dense.")
    assert masked(*init) == {"down_proj"}
    (tmp_path / "a").rename(tmp_path / "b")
    assert masked("import", tmp_path / "b", *given) == {"down_proj"}
    train = ["train", "--init-mask", "magnitude", "--text", text, "--seq-len", 32, "--max-steps", 1, *given]
    assert masked(*train) == {"down_proj"}


def test_the_best_mask_is_kept(text, train, tmp_path):
    (tmp_path / "other.txt").write_text(" ".join(reversed(text.read_text().split()[:500])))
    given = ["--eval-text", tmp_path / "other.txt", "--eval-steps", 1, "--save-steps", 1, "--early-stopping", 1]
    given += ["--logging-steps", 1]
    command = [*train[:-1], tmp_path / "b", "--max-steps", 8, "--learning-rate", 5, *given, "--json"]
    figures = json.loads(run(*command).stdout)
    assert figures["steps"] in (figures["best_step"] + 1, 8)
    inspected = json.loads(run("inspect", tmp_path / "b", "--json").stdout)
    assert figures["changed"] == pytest.approx(inspected["groups_changed"][-1])
    base = command[command.index("--model") + 1]
    measured = run(
        "eval",
        "--model",
        base,
        "--adapter",
        tmp_path / "b",
        "--text",
        tmp_path / "other.txt",
        "--seq-len",
        32,
        "--json",
    )
    assert json.loads(measured.stdout)["perplexity"] == pytest.approx(figures["eval_perplexity"], rel=1e-4)


def test_a_resumed_run_stops_early_where_a_whole_one_does(text, train, tmp_path):
    # In so few steps no mask changes, so that none is better than the first.
    command = [*train[:-1], tmp_path / "b", "--max-steps", 8, "--learning-rate", 1e-6, "--save-total-limit", 8]
    command += ["--eval-text", text, "--save-steps", 1, "--early-stopping", 2, "--json"]
    assert json.loads(run(*command).stdout)["steps"] == 3
    rmtree(tmp_path / "b" / "checkpoint-3")
    assert json.loads(run(*command, "--resume").stdout)["steps"] == 3


def test_data_types(checkpoint, adapter, text, train, tmp_path):
    run(*train, "--logits-dtype", "bfloat16", "--dtype", "bfloat16", "--optim", "adafactor", "--save-steps", 2)
    theta = load_file(tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in theta.items() if name.endswith("theta")} == {torch.bfloat16}
    run(*train, "--adapter", adapter, "--logits-dtype", "bfloat16", "--save-steps", 2, "--overwrite")
    theta = load_file(tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in theta.items() if name.endswith("theta")} == {torch.bfloat16}


def test_messages_name_options():
    options = {"seq_len": "--seq-len", "n": "--n", "init_mask": "--method"}
    assert in_options("n is 4; lower seq_len.", options) == "--n is 4; lower --seq-len."
    assert in_options("init_mask is 'a'", options) == "--method is 'a'"
    assert in_options("--seq_len is; pass overwrite=True", options | {"overwrite": "--overwrite"}) == (
        "--seq-len is; pass --overwrite"
    )
    assert in_options('use init_mask="a"', options) == "use --method a"
    assert in_options("use init_mask='a', n=2 or seq_len=8", options) == "use --method a, --n 2 or --seq-len 8"
    assert in_options("/tmp/seq_len/x and seq_len.py, a n is", options) == "/tmp/seq_len/x and seq_len.py, a n is"


def test_an_adapter_that_does_not_fit_is_named(checkpoint, adapter, text, tmp_path):
    run(
        "init",
        "--model",
        checkpoint,
        "--method",
        "magnitude",
        "--target-modules",
        "q_proj",
        "--output",
        tmp_path / "q",
    )
    (tmp_path / "q" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    assert f"{tmp_path / 'q'}: " in fails("eval", "--model", checkpoint, "--adapter", tmp_path / "q", "--text", text)


def test_adapters_and_checkpoints_have_the_usual_permissions(checkpoint, train, tmp_path):
    before = os.umask(0o027)
    try:
        run(*train)
        given = ["--model", checkpoint, "--adapter", tmp_path / "a", "--output", tmp_path / "s", "--allow-dense"]
        run("merge", *given)
    finally:
        os.umask(before)
    written = [path for folder in ("a", "s") for path in (tmp_path / folder).iterdir() if path.is_file()]
    assert len(written) > 5
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o640"}


class TestInterrupted:
    """What is to be replaced is there until its successor is complete."""

    def test_twice_and_the_original_is_back(self, train, monkeypatch, tmp_path):
        def interrupted(trainer, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MaskProTrainer, "train", interrupted)
            for _ in range(2):
                run(*train, "--init-mask", "magnitude", code=130)
                assert list(tmp_path.iterdir()) == []
        run(*train)
        mask = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(MaskProTrainer, "train", interrupted)
            for _ in range(2):
                run(*train, "--overwrite", code=130)
                assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == mask
                assert [path.name for path in tmp_path.iterdir()] == ["a"]
        run(*train, "--overwrite")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_a_run_that_is_told_to_stop_can_be_resumed(self, train, monkeypatch, tmp_path):
        step = MaskProTrainer.training_step

        def stopped(trainer, *arguments):
            signal.raise_signal(signal.SIGTERM)
            return step(trainer, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(MaskProTrainer, "training_step", stopped)
            run(*train, code=143)
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-1"]
        run(*train, "--resume")
        assert (tmp_path / "a" / "adapter_model.safetensors").is_file()

    def test_a_run_with_checkpoints_stays_to_be_resumed(self, train, tmp_path):
        output = tmp_path / "a"
        output.mkdir()
        (output / "precious").write_text("x")
        # As if it had been killed.
        for _ in range(2):
            set_aside(output)
            (output / "checkpoint-1").mkdir()
            assert not (output / "precious").exists()
        put_back(output)
        assert [path.name for path in output.iterdir()] == ["precious"]
        set_aside(output)
        forget_previous(output)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_what_another_command_has_completed_meanwhile_is_what_is_put_back(self, tmp_path):
        output = tmp_path / "link"
        (tmp_path / "a").mkdir()
        output.symlink_to(tmp_path / "a")
        (output / "precious").write_text("x")
        # As if it had been killed.
        set_aside(output)
        (output / "adapter_config.json").write_text("{}")
        set_aside(output)
        put_back(output)
        assert [path.name for path in output.iterdir()] == ["adapter_config.json"]
        assert {path.name for path in tmp_path.iterdir()} == {"a", "link"}


@pytest.mark.parametrize(
    "command",
    [
        ["push", "ADAPTER", "me/mask"],
        ["inspect", "maks"],
        ["eval", "--model", "maks", "--text", "TEXT"],
        ["eval", "--model", "MODEL", "--adapter", "runs/maks", "--text", "TEXT"],
        ["eval", "--model", "MODEL", "--compare", "MODEL", "maks", "--text", "TEXT"],
        ["import", "runs/maks", "--model", "MODEL", "--output", "OUT"],
        ["init", "--model", "runs/maks", "--text", "TEXT", "--output", "OUT"],
        ["init", "--model", "MODEL", "--text", "TEXT", "--method", "me/maks", "--output", "OUT"],
        ["init", "--model", "MODEL", "--dataset", "maks", "--output", "OUT"],
        ["train", "--model", "runs/maks", "--text", "TEXT", "--output", "OUT"],
        ["train", "--model", "MODEL", "--text", "TEXT", "--adapter", "runs/maks", "--output", "OUT"],
        ["train", "--model", "MODEL", "--text", "TEXT", "--init-mask", "me/maks", "--output", "OUT"],
        ["train", "--model", "MODEL", "--dataset", "me/maks", "--output", "OUT"],
        ["eval", "--model", "MODEL", "--dataset", "me/maks"],
        ["merge", "--model", "runs/maks", "--adapter", "ADAPTER", "--output", "OUT"],
        ["export", "--model", "maks", "--target", "cpu", "--output", "OUT"],
        ["bench", "--model", "maks"],
        ["quickstart", "--model", "runs/maks", "--output", "OUT"],
    ],
)
def test_without_a_network_there_is_one_line_at_once(checkpoint, adapter, text, tmp_path, monkeypatch, command):
    asked = []

    def resolve(*where, **options):
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    known = {"ADAPTER": adapter, "MODEL": checkpoint, "TEXT": text, "OUT": tmp_path / "out"}
    done = run(*(known.get(word, word) for word in command), code=1)
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("warning: "))
    assert line.startswith("error: ")
    assert "the Hub cannot be reached" in line
    named = [word for word in command if "maks" in word]
    assert all(f"{word} is not a folder here" in line for word in named)
    # To make a repository the client may ask twice.
    assert 1 <= len(asked) <= (2 if command[0] == "push" else 1)


def test_an_unexpected_failure_of_our_own_keeps_its_traceback(checkpoint, monkeypatch):
    monkeypatch.setattr("hf_maskpro.cli.inspect.check_on_hub", None)
    with pytest.raises(TypeError):
        run("inspect", "no/such")


def test_python_m_runs_the_command():
    """As torchrun does, and with no more noise than the script."""
    done = subprocess.run([sys.executable, "-m", "hf_maskpro_cli", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("hf-maskpro ")
    assert done.stderr == ""


def test_defaults_are_those_of_python():
    known = get_command(app).commands
    options = {option.name: option.default for option in known["train"].params}
    python = {field.name: field.default for field in fields(MaskProTrainingArguments)}
    python["seq_len"] = python["max_length"]
    # A run counts in epochs in Python, and keeps all checkpoints and logs; None is the other's default.
    own = {"max_steps", "save_steps", "logging_steps", "report_to"}
    shared = {name for name, default in options.items() if name in python and default is not None} - own
    assert {"estimator", "per_device_train_batch_size", "seq_len", "seed"} <= shared
    assert {name: options[name] for name in shared} == {name: python[name] for name in shared}
    one_call = {name: known.default for name, known in signature(sparsify).parameters.items()}
    patterns = {field.name: field.default for field in fields(MaskProConfig) if field.name in ("n", "m")}
    assert patterns.items() <= one_call.items()
    # The one exception: a configuration alone has no data, and this is the mask to take without.
    assert MaskProConfig().init_mask == "magnitude"
    starts = {option.name: option.default for option in known["init"].params}
    assert {name: starts[name] for name in ("n", "m", "init_mask")} == {
        name: one_call[name] for name in ("n", "m", "init_mask")
    }
    assert patterns == {option.name: option.default for option in known["import"].params if option.name in patterns}
    # With --adapter it is the adapter's.
    helps = {option.name: option.help for option in known["train"].params}
    assert all(f"{one_call[name]} unless given" in helps[name] for name in ("n", "m", "init_mask"))
    for drawn in (random_windows, generated_text, mixed_windows):
        assert signature(drawn).parameters["seed"].default == starts["seed"] == options["seed"]
