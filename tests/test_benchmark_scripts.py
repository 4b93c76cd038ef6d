"""The scripts of `benchmarks/`, whose rows cost minutes to hours each: which are made, and which are kept."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from shutil import copyfile, rmtree

import pytest
import torch

import ablations
import gpu
import leaderboard
import protocol
import start_settings

from .cli.test_cli import run


LEARNED = [f"{estimator} from {start or 'sparsegpt+swaps'}" for estimator, start in leaderboard.LEARNERS]
PERPLEXITIES = {"wanda": 60.0, "sparsegpt+swaps": 50.0, "adapter": 30.0}


class CommandLine:
    """Stands in for `hf-maskpro`: notes its calls, and leaves behind what the scripts read. A step takes 0.5 s."""

    def __init__(self):
        self.calls: list[list[str]] = []
        self.interrupt_at = ""

    def __call__(self, arguments):
        options = dict(pairwise(arguments))
        if self.interrupt_at and self.interrupt_at in " ".join(arguments):
            if arguments[0] == "train":
                (Path(options["--output"]) / "checkpoint-50").mkdir(parents=True)
            raise KeyboardInterrupt
        self.calls.append(arguments)
        figures = {"bits_per_weight": 0.67}
        if arguments[0] == "eval":
            name = Path(options["--adapter"]).name if "--adapter" in options else "dense"
            paths = [value for option, value in pairwise(arguments) if option in ("--home", "--text")]
            value = PERPLEXITIES.get(name, 100.0)
            measured = {"perplexity": value, "protocol": "windows"}
            figures = {"texts": {path: dict(measured) for path in paths}}
            if "--adapter" in options:
                for number, text in enumerate(figures["texts"].values()):
                    text |= {"dense_perplexity": 25.0, "ratio": value / 25, "kl": number / 2}
                figures |= {"at_home": value / 25, "elsewhere": value / 20}
        elif arguments[0] in ("init", "train"):
            folder = Path(options["--output"])
            folder.mkdir(parents=True, exist_ok=True)
            steps = int(options.get("--max-steps", 0))
            (folder / "adapter_config.json").write_text(json.dumps({"lineage": [{"training": {"steps": steps}}]}))
            figures = {"seconds": 1 + steps / 2, "changed": 0.1}
        return json.dumps(figures), 1.0, 2**20

    def trained(self):
        """What was trained, but for the trials."""
        return [arguments for arguments in self.calls if arguments[0] == "train" and "--logging-steps" in arguments]


@pytest.fixture(autouse=True)
def no_start_token(monkeypatch):
    """Of a model that is not there."""
    monkeypatch.setattr(protocol, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(protocol, "start_token_of", lambda tokenizer: None)


@pytest.fixture
def commands(monkeypatch):
    stand_in = CommandLine()
    monkeypatch.setattr(leaderboard, "run", stand_in)
    monkeypatch.setattr(leaderboard, "plot", lambda rows, path: None)
    monkeypatch.setattr(protocol, "write_dense_samples", lambda base, path, cache: path.write_text("said"))
    return stand_in


@pytest.fixture
def make(commands, monkeypatch, tmp_path):
    """Run the leaderboard; returns its rows by method."""
    text, web = tmp_path / "wiki.txt", tmp_path / "web.txt"
    text.write_text("".join(f"line {i}\n" for i in range(100)))
    web.write_text("A page of 1 @,@ 000 words.")
    results = tmp_path / "results.json"

    def make(*options, seconds=100):
        commands.calls.clear()
        argv = ["--text", text, "--elsewhere", web, "--model", "me/model", "--work", tmp_path / "work"]
        argv += ["--results", results]
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, [*argv, "--seconds", seconds, *options])])
        leaderboard.main()
        rows = json.loads(results.read_text())
        known = {row["method"]: row for row in rows}
        assert len(known) == len(rows)
        return known

    return make


def test_what_the_dense_model_writes_is_plain_text_and_conversations_by_turns(monkeypatch, tmp_path):
    class Tokenizer:
        def batch_decode(self, rows):
            return [str(row[0].item()) for row in rows]

    made = []

    def generated_text(model, tokenizer, samples, seq_len, seed, cache):
        made.append((seq_len, seed, cache))
        return [{"input_ids": batch} for batch in torch.arange(samples)[:, None].split(8)]

    monkeypatch.setattr(protocol, "load_to_run", lambda base: (None, Tokenizer()))
    monkeypatch.setattr(protocol, "generated_text", generated_text)
    path = tmp_path / protocol.SAMPLES_NAME
    protocol.write_dense_samples("me/model", path, tmp_path / "cache")
    assert path.read_text().split() == [str(i) for pair in zip(range(32), range(32, 64), strict=True) for i in pair]
    # The default is the seed that learners would have.
    assert made == [(protocol.SEQ_LEN, 0, tmp_path / "cache")]


def test_an_interrupted_leaderboard_goes_on(make, commands, tmp_path):
    commands.interrupt_at = "init --model me/model --method ria"
    with pytest.raises(KeyboardInterrupt):
        make()
    made = ["dense", "magnitude", "random", "wanda"]
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())] == made
    commands.interrupt_at = ""
    rows = make()
    again = [arguments[arguments.index("--method") + 1] for arguments in commands.calls if arguments[0] == "init"]
    assert again == ["ria", "sparsegpt", "gblm", "pruner-zero", "wanda+swaps", "sparsegpt+swaps"]
    assert list(rows) == [*made, *again, *LEARNED]
    assert make() == rows
    assert commands.calls == []


def test_an_interrupted_learner_goes_on(make, commands, tmp_path):
    commands.interrupt_at = "--max-steps 196"
    with pytest.raises(KeyboardInterrupt):
        make()
    commands.interrupt_at = ""
    (spent,) = (tmp_path / "work").glob("*/seconds.json")
    spent.write_text("80")
    row = make()["simple from sparsegpt+swaps"]
    simple, *others = commands.trained()
    assert "--resume" in simple
    assert not any("--resume" in arguments for arguments in others)
    assert len([arguments for arguments in commands.calls if arguments[0] == "train"]) == 1 + 4 * (len(LEARNED) - 1)
    assert 80 < row["seconds"] < 85
    # (100 s - 2 s of two steps) / 0.5 s.
    assert row["steps"] == 196
    assert row["budget_seconds"] == 100
    assert row["training"] == {"steps": 196}


def test_another_budget_makes_the_learners_anew(make, commands, tmp_path):
    first = make()
    (tmp_path / "work" / "simple from sparsegpt+swaps in 100.0 seconds" / "adapter" / "checkpoint-196").mkdir()
    second = make(seconds=200)
    learners = {name for name in first if " from " in name}
    assert {name: row for name, row in first.items() if name not in learners} == {
        name: row for name, row in second.items() if name not in learners
    }
    assert not any(arguments[0] == "init" for arguments in commands.calls)
    assert not any("--resume" in arguments for arguments in commands.trained())
    # Though what was learned is better than any start.
    assert learners == {name for name in second if " from " in name} == set(LEARNED)
    for name in learners:
        assert second[name]["perplexity"] == 30
        assert second[name]["budget_seconds"] == 200
        assert second[name]["steps"] == second[name]["training"]["steps"] == 396


def test_a_start_that_is_not_there_is_made_again(make, commands, tmp_path):
    first = make()
    rmtree(tmp_path / "work")
    second = make(seconds=200)
    made = {arguments[arguments.index("--method") + 1] for arguments in commands.calls if arguments[0] == "init"}
    assert made == {name.partition(" from ")[2] for name in LEARNED}
    assert second["sparsegpt+swaps"] == first["sparsegpt+swaps"]


def test_results_of_another_protocol_are_not_mixed(make, commands, tmp_path):
    make()
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"results\.json was obtained by another protocol: me/model on .* 16,384 tok"):
        make("--max-tokens", 512)
    assert commands.calls == []
    assert (tmp_path / "results.json").read_bytes() == before


def test_both_columns_come_from_one_command(make, commands, tmp_path, capsys):
    rows = make("--dense-samples")
    measured = [arguments for arguments in commands.calls if arguments[0] == "eval"]
    assert len(measured) == len(rows)
    work = tmp_path / "work"
    for arguments in measured:
        given = [pair for pair in pairwise(arguments) if pair[0] in ("--home", "--text")]
        others = [
            ("--text", str(work / "elsewhere" / name))
            for name in ("web.txt", "python-topics.txt", "dense-samples.txt")
        ]
        assert given == [("--home", str(work / "held_out.txt")), *others]
    assert (work / "elsewhere" / "web.txt").read_text() == "A page of 1,000 words."
    assert "lambda" in (work / "elsewhere" / "python-topics.txt").read_text()
    assert (rows["dense"]["at_home"], rows["dense"]["elsewhere"]) == (1, 1)
    assert (rows["wanda"]["at_home"], rows["wanda"]["elsewhere"]) == (60 / 25, 60 / 20)
    assert rows["wanda"]["texts"].keys() == {"held_out.txt", "web.txt", "python-topics.txt", "dense-samples.txt"}
    assert rows["wanda"]["texts"]["web.txt"] == {
        "perplexity": 60, "dense_perplexity": 25, "ratio": 2.4, "kl": 0.5,
    }  # fmt: skip
    assert (
        "Elsewhere: the geometric mean over web.txt, python-topics.txt, dense-samples.txt" in rows["wanda"]["protocol"]
    )
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit, match="was obtained by another protocol"):
        make()
    # The mean of 0.5, 1 and 1.5; that at home, 0, is left out.
    assert "| wanda | 60.00 | 2.40 | 3.00 | 1.00 |" in printed
    assert "| dense | 100.00 | 1.00 | 1.00 |  |" in printed


def test_texts_to_learn_from_are_held_out_in_turns(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name}{i}\n\n" for i in range(20)))
    base, others = protocol.prepare([tmp_path / "a", tmp_path / "b"], [], "me/model", tmp_path / "work")
    assert (base, others) == ("me/model", [tmp_path / "work" / "elsewhere" / "python-topics.txt"])
    calibration, held_out = ((tmp_path / "work" / f"{name}.txt").read_text() for name in ("calibration", "held_out"))
    assert calibration.split() == [f"{name}{i}" for name in "ab" for i in range(17)]
    assert held_out.split() == ["a17", "b17", "a18", "b18", "a19", "b19"]


def test_texts_of_one_name_are_refused(tmp_path):
    for named in (["a/web.txt", "b/web.txt"], ["a/held_out.txt"], ["a/dense-samples.txt"]):
        with pytest.raises(SystemExit, match=f"two texts are named {named[-1][2:]}"):
            protocol.prepare([], [tmp_path / path for path in named], "me/model", tmp_path / "work")


def test_the_text_is_split_once(tmp_path):
    lines = [f"Line {i} : a well @-@ known 1 @,@ 024 and 3 @.@ 5 , <unk> .\n" for i in range(50)]
    (tmp_path / "wiki.txt").write_text("".join(lines))
    calibration, held_out = protocol.split(tmp_path / "wiki.txt")
    whole = "".join(f"Line {i} : a well-known 1,024 and 3.5 , <unk> .\n" for i in range(50))
    assert calibration + held_out == whole
    assert held_out[0] == "\n"
    assert 0 <= len(calibration) - 0.8 * len(whole) < len(lines[0])


def test_interrupted_ablations_go_on(monkeypatch, tmp_path, capsys):
    runs = []

    def run(command, **options):
        job = json.loads(command[command.index("--worker") + 1])
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(job["settings"])
        figures = {"steps": 50, "training_tokens": 4096, "changed": 0.1, "perplexity": 40.0}
        figures |= {"at_home": 1.6, "elsewhere": 2.5}
        Path(job["result"]).write_text(json.dumps(job["settings"] | figures))

    monkeypatch.setattr(ablations.subprocess, "run", run)
    monkeypatch.setattr(protocol, "start", lambda base, method, work: work / method)
    (tmp_path / "wiki.txt").write_text("line\n" * 100)
    argv = ["--text", tmp_path / "wiki.txt", "--model", "me/model", "--work", tmp_path / "work"]
    argv += ["--results", tmp_path / "results.json", "--json"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, argv)])
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    assert runs == [ablations.BASE | change for change in ablations.CHANGES[:2]]
    made = runs.copy()
    runs[:] = [None] * 3
    ablations.main()
    assert made + runs[3:] == [ablations.BASE | change for change in ablations.CHANGES]
    assert len(json.loads(capsys.readouterr().out)) == len(ablations.CHANGES)


@pytest.mark.parametrize("wrong", ["foo", "start", "width=3", "batch=many", "tokens="])
def test_a_wrong_setting_of_the_ablations(monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--text", "absent.txt", "--set", "batch=4", wrong])
    with pytest.raises(SystemExit):
        ablations.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument --set: {wrong!r} is no setting; name one of start, logit_scale" in last


def test_settings_of_the_ablations_have_the_type_of_the_default():
    entries = ["start=wanda", "logit_scale=5", "batch=4", "tokens=32768", "weight_decay=0.1"]
    settings = dict(map(ablations.setting, entries))
    assert settings == {
        "start": "wanda", "logit_scale": 5.0, "batch": 4, "tokens": 32_768, "weight_decay": 0.1,
    }  # fmt: skip
    assert {name: type(value) for name, value in settings.items()} == {
        "start": str, "logit_scale": float, "batch": int, "tokens": int, "weight_decay": float,
    }  # fmt: skip


def test_a_run_of_the_ablations_has_its_settings(monkeypatch, checkpoint, text, tmp_path):
    seen, begin = [], ablations.MaskProTrainer.__init__

    def watched(trainer, model, args, **options):
        seen.append(args)
        begin(trainer, model, args, **options)

    monkeypatch.setattr(ablations.MaskProTrainer, "__init__", watched)
    monkeypatch.setattr(protocol, "SEQ_LEN", 16)
    for name in ("calibration.txt", "held_out.txt", "web.txt"):
        copyfile(text, tmp_path / name)
    run("init", "--model", checkpoint, "--method", "magnitude", "--output", tmp_path / "start")
    settings = ablations.BASE | {"batch": 2, "seq_len": 16, "objective": "distillation", "weight_decay": 0.1}
    paths = [str(tmp_path / "start"), tmp_path, [str(tmp_path / "web.txt")]]
    ablations.worker(settings, str(checkpoint), *paths, 2, [1], tmp_path / "row.json")
    (args,) = seen
    assert {name: getattr(args, name) for name in ("objective", "weight_decay", "learning_rate", "seed")} == {
        name: settings[name] for name in ("objective", "weight_decay", "learning_rate", "seed")
    }
    row = json.loads((tmp_path / "row.json").read_text())
    assert [point["step"] for point in row["curve"]] == [1, 2]
    assert row["elsewhere"] == row["texts"]["web.txt"]["ratio"] == row["at_home"] != 1


def test_every_pair_of_settings_of_a_start_is_a_mask(monkeypatch, checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"A line of text, number {i}.\n" for i in range(2000)))
    settings = ["--shrinkage", 0, 0.9, "--towards", 0.2]
    argv = ["--text", tmp_path / "text.txt", "--model", checkpoint, "--work", tmp_path / "work", *settings]
    # What it sets holds for the process.
    monkeypatch.setattr(start_settings.walk, "SHRINKAGE", 0.3)
    monkeypatch.setattr(start_settings.starts, "TOWARDS_DENSE", 0.2)
    monkeypatch.setattr(protocol, "SEQ_LEN", 32)
    monkeypatch.setattr(protocol, "CALIBRATION_SEQ_LEN", 32)
    monkeypatch.setattr(sys, "argv", ["start_settings.py", *map(str, argv), "--max-tokens", "640", "--json"])
    start_settings.main()
    plain, shrunk = json.loads(capsys.readouterr().out)
    assert (plain["shrinkage"], shrunk["shrinkage"]) == (0, 0.9)
    assert plain["texts"]["held_out.txt"]["ratio"] == plain["at_home"] != shrunk["at_home"]
    assert plain["elsewhere"] > 0


class TestOnAGpu:
    def test_in_miniature(self, tmp_path):
        pytest.importorskip("triton")
        output = tmp_path / "gpu.json"
        root = Path(gpu.__file__).parents[1]
        path = os.pathsep.join([str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, gpu.__file__, "--small", "--output", str(output)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        figures = json.loads(output.read_text())
        assert {name: part.get("log") for name, part in figures["parts"].items() if part["outcome"] != "passed"} == {}
        assert done.returncode == 0
        names = [name for name in gpu.PARTS if name != "masks against the CPU"]
        assert list(figures["parts"]) == names
        assert figures["in_miniature"]
        for name in names:
            assert f"│ {name} " in done.stdout

    def test_no_part_spoils_the_next(self, tmp_path, monkeypatch):
        def sleep(small):
            yield {"rows": 2, "says": "two rows"}
            subprocess.run(["sleep", "60"])

        def end(small):
            os._exit(3)
            yield

        def fail(small):
            yield {"rows": 1, "says": "one row"}
            raise ValueError("out of order")

        def work(small, word):
            yield {"says": word}

        parts = {
            "ends": (end, (), 10),
            "sleeps": (sleep, (), 0.5),
            "fails": (fail, (), 10),
            "works": (work, ("fine",), 10),
        }
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "warm_up", lambda: None)
        # Others set none before the process ends, and this one goes on.
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        output = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output)])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == 1
        found = json.loads(output.read_text())["parts"]
        assert {name: part["outcome"] for name, part in found.items()} == {
            "ends": "failed",
            "sleeps": "over time",
            "fails": "failed",
            "works": "passed",
        }
        assert (found["fails"]["rows"], found["fails"]["says"]) == (1, "ValueError: out of order; so far: one row")
        assert (found["sleeps"]["rows"], found["sleeps"]["says"]) == (2, "over time, so far: two rows")
        assert found["works"]["says"] == "fine"
        assert found["sleeps"]["seconds"] < 10
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output), "--minutes", "0"])
        with pytest.raises(SystemExit):
            gpu.main()
        assert {part["says"] for part in json.loads(output.read_text())["parts"].values()} == {"no time was left"}
