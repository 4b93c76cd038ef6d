"""What the script does before it loads anything."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import hf_maskpro
from hf_maskpro.cli import app, options
from hf_maskpro.cli.train import Estimator
from hf_maskpro.cli.training_options import training_fields
from hf_maskpro.learning import ESTIMATORS, MaskProTrainingArguments
from hf_maskpro.tuner import RULES

from .test_cli import run


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
# As the script that pip makes of the entry point, which then says what has been loaded.
PROGRAM = """
import sys
sys.argv[0] = "hf-maskpro"
from MODULE import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
""".replace("MODULE", PROJECT["project"]["scripts"]["hf-maskpro"].partition(":")[0])
VERBS = typer.main.get_command(app).commands
HEAVY = {"torch", "transformers", "peft", "numpy", "huggingface_hub", "safetensors", "accelerate", "datasets"}


def started(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    printed, _, loaded = done.stderr.rpartition("loaded: ")
    assert not HEAVY & set(loaded.split())
    assert "typer" in loaded.split()
    return done.returncode, done.stdout + printed


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--help"], 0, "quickstart"),
        (["train", "--help"], 0, "--gradient-accumulation-steps"),
        (["--version"], 0, f"hf-maskpro {hf_maskpro.__version__}"),
        (["trian"], 2, "Did you mean 'train'"),
        (["merge", "--modle", "m"], 2, "--modle"),
        (["train", "--lerning-rate", "1"], 2, "error: No such option: --lerning-rate. Did you mean --learning-rate?"),
        (["train", "--wieght-decay", "1"], 2, "error: No such option: --wieght-decay. Did you mean --weight-decay?"),
        (["train", "--weight-decay", "abc"], 2, "error: --weight-decay is abc; give a number, 0 or more. See"),
        (["train", "--num-train-epochs", "1"], 2, "--num-train-epochs is --max-steps here"),
        (["train", "text.txt"], 2, "text.txt belongs to no option"),
        (["train", "--learning-rate", "-1"], 2, "Invalid value for '--learning-rate'"),
        (["train", "--estimator", "simpel"], 2, "Invalid value for '--estimator'"),
        (["train", "--init-mask", "wnada"], 2, "Did you mean wanda?"),
        (["init", "--method", "wnada+swaps"], 2, "wnada+swaps is neither a rule"),
        (["init", "--m", "17"], 2, "Invalid value for '--m'"),
        (["eval", "--seq-len", "many"], 2, "Invalid value for '--seq-len'"),
    ],
)
def test_it_answers_before_anything_is_loaded(arguments, code, printed):
    given = ["--model", "m", "--output", "o", "--text", "t"] if code == 2 and arguments[0] in ("train", "init") else []
    ended, lines = started(*arguments, *given)
    assert ended == code
    assert printed in " ".join(lines.replace("│", " ").split())


def test_importing_the_package_registers_the_method():
    program = "import hf_maskpro, peft; print(peft.PeftType.MASKPRO, hf_maskpro.MaskProConfig().pattern)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "2:4"


def test_names_that_are_not_imported_are_those_of_the_library():
    assert options.RULES == RULES
    assert set(Estimator.__args__) == set(ESTIMATORS)
    assert set(training_fields()) == {field.name for field in fields(MaskProTrainingArguments) if field.init}


def test_the_version_is_written_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "hf_maskpro.version.__version__"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_option_whole_and_an_example(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run(verb, "--help").stdout
    names = {name for known in VERBS[verb].params for name in (*known.opts, *known.secondary_opts)}
    shown = set(re.findall(r"--[a-z0-9-]+", printed))
    assert {name for name in names if name.startswith("--")} <= shown
    assert "…" not in printed
    assert f"Example: hf-maskpro {verb}" in printed
    in_no_group = re.search(r"╭─ Options ─.*?╰", printed, re.DOTALL)[0]
    assert set(re.findall(r"--[a-z0-9-]+", in_no_group)) <= {"--seed", "--json", "--help"}


def raises(node):
    return isinstance(node, ast.Raise)


def called(code, functions, found=()):
    """Those of the functions that the code names, and that these name in turn."""
    names = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
    more = [functions[name] for name in names & functions.keys() if functions[name] not in found]
    found = [*found, *more]
    for each in more:
        found = called(each, functions, found)
    return found


def test_messages_of_python_name_no_options():
    """The command turns names of arguments into its options."""
    package = Path(hf_maskpro.__file__).parent
    said = []
    for file in (file for file in package.rglob("*.py") if file.parent != package / "cli"):
        said += [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if raises(node)]
    # Those of commands are named after them.
    assert [line for line in said if re.search("--[a-z]", re.sub(r"hf-maskpro \w+ --[a-z-]+", "", line))] == []


@pytest.mark.parametrize("verb", VERBS)
def test_messages_and_help_advise_options_of_their_verb(verb):
    known = VERBS[verb]
    file = Path(sys.modules[known.callback.__module__].__file__)
    code = ast.parse(file.read_text())
    shared = {}
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module in ("inputs", "common"):
            functions = ast.parse((file.parent / f"{node.module}.py").read_text()).body
            shared |= {each.name: each for each in functions if isinstance(each, ast.FunctionDef)}
    said = [ast.unparse(each) for part in (code, *called(code, shared)) for each in ast.walk(part) if raises(each)]
    said += [option.help or "" for option in known.params]
    # Those of other commands are named after them.
    text = re.sub(r"(hf-maskpro \w+|pip install|init's) --[a-z-]+", "", " ".join(said))
    names = {name for option in known.params for name in (*option.opts, *option.secondary_opts)}
    names |= {f"--{name.replace('_', '-')}" for name in training_fields()} if verb == "train" else set()
    assert set(re.findall("--[a-z][a-z0-9-]*", text)) <= names


def test_shells_can_complete():
    environment = os.environ | {
        "_HF_MASKPRO_COMPLETE": "complete_bash",
        "COMP_WORDS": "hf-maskpro tr",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert "train" in done.stdout.split()
    assert not HEAVY & set(done.stderr.rpartition("loaded: ")[2].split())


@pytest.mark.slow
def test_a_row_of_the_quickstart_makes_no_noise():
    """Where torchao is installed, importing it says several lines."""
    program = "import hf_maskpro_cli; hf_maskpro_cli.quickstart_row()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, "--help"], capture_output=True, text=True)
    assert "--held-out" in done.stdout
    assert done.stderr == ""


def test_what_other_packages_log_is_no_noise():
    program = PROGRAM.replace("try:", "import logging\ntry:").replace(
        "finally:", "finally:\n    logging.getLogger('torchao').warning('skipping extensions')"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True)
    assert "loaded: " in done.stderr
    assert "skipping" not in done.stderr
