"""Values that cannot be right, of every verb: refused in one line, before anything heavy is imported."""

import shlex
import sys

import pytest

from hf_maskpro.cli.inputs import needs_text
from hf_maskpro.starts import needs_data
from hf_maskpro.tuner import RULES

from .test_cli import adapter, fails, run


__all__ = ["adapter"]

GIVEN = {
    "quickstart": "quickstart --output OUT",
    "init": "init --model MODEL --text TEXT --output OUT",
    "import": "import ADAPTER --model MODEL --output OUT",
    "train": "train --model MODEL --text TEXT --output OUT",
    "eval": "eval --model MODEL --text TEXT",
    "merge": "merge --model MODEL --adapter ADAPTER --output OUT",
    "export": "export --model MODEL --adapter ADAPTER --target cpu --output OUT",
    "inspect": "inspect ADAPTER",
    "push": "push ADAPTER me/mask",
    "bench": "bench --model MODEL",
}
OF_MODELS = {"--model ./no": "./no does not exist", "--model EMPTY": "no config.json", "--model TEXT": "is a file"}
OF_TEXTS = {"--text no.txt": "no.txt does not exist", "--text EMPTY/void.txt": "is empty", "--text BYTES": "UTF-8"}
OF_DATASETS = {"--dataset ./no": "./no does not exist", "--dataset TEXT": "is a file; pass a text by --text"}
OF_ADAPTERS = {"--adapter ./no": "./no does not exist", "--adapter MODEL": "has no ./adapter_config.json"}
OF_NO_ADAPTER = {
    "--revision v2": "--revision is v2, of an adapter's repository; pass --adapter, or drop it",
    "--subfolder deep": "--subfolder is deep, of an adapter's repository; pass --adapter, or drop it",
}
OF_PATTERNS = {
    "--n 0": "'--n'",
    "--n 5 --m 4": "--n is 5, outside 1 to --m - 1 = 3",
    "--m 17": "'--m'",
    "--n many": "'--n'",
}
OF_LAYERS = {"--target-modules [": "[ is neither ends of names nor a regular", "--exclude-modules *": "* is neither"}
OF_MIXTURES = {"--weights 1,2": "--weights is '1,2'", "--weights much": "--weights is 'much'"}

WRONG = {
    "quickstart": OF_TEXTS
    | {"--minutes nan": "--minutes is nan", "--minutes 0": "--minutes is 0", "--estimator simpel": "'--estimator'"}
    | {"--model ./no": "./no does not exist"},
    "init": OF_MODELS
    | OF_TEXTS
    | OF_DATASETS
    | OF_PATTERNS
    | OF_LAYERS
    | OF_MIXTURES
    | {
        "--method wnada": "Did you mean wanda?",
        "--method ./no": "./no does not exist",
        "--method no.npz": "no.npz does not exist",
        "--seq-len 1": "'--seq-len'",
        "--samples 0": "'--samples'",
        "--seed -1": "'--seed'",
        "--dtype float8": "'--dtype'",
        "--self-generated --chat": "drop --self-generated or --chat",
        "--source-settings --samples 3": "drop the one or the other",
        "--gguf-file no.gguf": "no.gguf does not exist",
    },
    "import": OF_MODELS | OF_PATTERNS | OF_LAYERS,
    "train": OF_MODELS
    | OF_TEXTS
    | OF_DATASETS
    | OF_ADAPTERS
    | OF_NO_ADAPTER
    | OF_PATTERNS
    | OF_LAYERS
    | OF_MIXTURES
    | {
        "--estimator proxsparse --m 8": "--estimator proxsparse learns 2:4 alone, not 2:8",
        "--estimator maskllm --n 3": "--estimator maskllm learns 2:4 and 1:4 alone, not 3:4",
        "--init-mask ./no": "./no does not exist",
        "--optim adafacter": "transformers knows no adafacter. Did you mean adafactor?",
        "--lr-scheduler-type cosin": "Did you mean cosine?",
        "--report-to tensorbord": "Did you mean tensorboard?",
        "--learning-rate nan": "--learning-rate",
        "--learning-rate inf": "--learning-rate is inf",
        "--logit-scale 0": "--logit-scale is 0.0, outside 0 to 40",
        "--logit-scale 41": "'--logit-scale'",
        "--logits-dtype float16": "'--logits-dtype'",
        "--max-steps 0": "'--max-steps'",
        "--max-tokens 10": "--max-tokens is 10, less than one window of --seq-len, 512",
        "--self-generated 10": "--self-generated is 10, less than one window of 512",
        "--per-device-train-batch-size 0": "'--per-device-train-batch-size'",
        "--gradient-accumulation-steps 0": "'--gradient-accumulation-steps'",
        "--logging-steps 0": "'--logging-steps'",
        "--eval-text no.txt": "no.txt does not exist",
        "--early-stopping 2": "pass --eval-text FILE",
        "--load_best_model_at_end": "pass --eval-text FILE",
        "--lr-scheduler-kwargs {": "--lr-scheduler-kwargs is {; give JSON",
        "--save-steps 5 --eval-steps 2 --eval-text TEXT": "--save-steps is 5, not a multiple of --eval-steps",
        "--adapter ADAPTER --m 8": "drop them or drop --adapter",
        "--max-length 32": "--max-length is --seq-len here",
        "--do-eval": "--do-eval is --eval-text here",
        "--do-predict true": "--do-predict is hf-maskpro eval here",
        "--calibration-samples 0": "No such option: --calibration-samples",
        "--weight-decay -3": "--weight-decay is -3; give a number, 0 or more",
        "--weight-decay=nan": "--weight-decay is nan",
        "--max-grad-norm": "--max-grad-norm is empty",
        "--adam-beta1 0.9 0.99": "--adam-beta1 is 0.9 0.99",
        "--dataloader-num-workers 1.5": "--dataloader-num-workers is 1.5; give a whole number",
        "--masks-per-step -1": "--masks-per-step is -1",
        "--bf16 maybe": "--bf16 is maybe; give true or false",
        "--advantage sclaed": "--advantage is sclaed; give scaled or raw",
        "--config no.yaml": "no.yaml cannot be read",
    },
    "eval": OF_MODELS
    | OF_TEXTS
    | OF_DATASETS
    | OF_ADAPTERS
    | OF_NO_ADAPTER
    | {
        "--home TEXT": "is both --home and --text",
        "--home no.txt": "no.txt does not exist",
        "--stride 512": "--stride is 512, outside 1 to --seq-len - 1 = 511",
        "--max-tokens 10": "--max-tokens is 10, less than one window of --seq-len, 512",
        "--limit 0": "'--limit'",
        "--limit 3": "--limit is 3, of the examples of a task; pass --tasks, or drop it",
        "--batch-size 0": "'--batch-size'",
        "--record": "pass one with --adapter",
        "--compare": "two or more",
        "more": "more is one too many",
    },
    "merge": OF_MODELS | OF_ADAPTERS | {"--subfolder no": "pass --subfolder with a folder of", "more": "more"},
    "export": OF_MODELS | OF_ADAPTERS | {"--target gguf": "'--target'"},
    "inspect": {
        "--n 4": "--n is 4, outside 1 to --m - 1 = 3",
        "--subfolder no": "pass --subfolder with a folder of",
        "--nonsense": "--nonsense",
    },
    "push": {"--nonsense": "--nonsense"},
    "bench": {
        "--model ./no": "./no does not exist",
        "--shapes 8b": "'--shapes'",
        "--shapes 7b": "either --model DIR or --shapes 7b",
        "--fp8 --packed": "either --fp8 or --packed",
        "--repeats 0": "'--repeats'",
        "--prefill-tokens 0": "'--prefill-tokens'",
        "--min-weights -1": "'--min-weights'",
    },
}


@pytest.fixture(scope="module")
def known(checkpoint, adapter, text, tmp_path_factory):
    """What the words of the commands below stand for."""
    folder = tmp_path_factory.mktemp("values")
    (folder / "void.txt").write_text(" \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00a")
    places = {"MODEL": checkpoint, "ADAPTER": adapter, "TEXT": text, "EMPTY": folder, "OUT": folder / "out"}
    return places | {"BYTES": folder / "bytes.txt"}


def typed(known, words):
    for word, path in known.items():
        words = words.replace(word, str(path))
    return shlex.split(words)


@pytest.mark.parametrize("verb", WRONG)
def test_wrong_values_are_refused_before_anything_is_imported(known, verb, monkeypatch):
    # Importing it would fail.
    for heavy in ("common", "..hub", "..deploy", "..evaluation", "..starts", "..learning", "..tuner"):
        name = f"hf_maskpro.{heavy[2:]}" if heavy.startswith("..") else f"hf_maskpro.cli.{heavy}"
        monkeypatch.setitem(sys.modules, name, None)
    for wrong, line in WRONG[verb].items():
        # Of a verb's usual command, without the options that are given wrongly.
        usual = GIVEN[verb]
        for option in ("--model MODEL", "--text TEXT", "--adapter ADAPTER", "--target cpu"):
            if f"{option.split()[0]} " in wrong and "--adapter ADAPTER" not in wrong:
                usual = usual.replace(option, "")
        done = run(*typed(known, f"{usual} {wrong}"), code=(1, 2))
        (said,) = done.stderr.strip().splitlines()
        assert said.startswith("error: ")
        assert line in said, f"{verb} {wrong}"
        assert done.stdout == ""
        assert not known["OUT"].exists()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("--vresion", "--vresion"),
        ("train --model m", "Missing option '--output'"),
        ("train --modle m --output OUT --text TEXT", "No such option: --modle. Did you mean --model?"),
        ("init --model MODEL --output OUT", "--method magnitude needs none"),
        ("train --model MODEL --output OUT", "nothing to learn from"),
        ("eval --model MODEL", "nothing to measure"),
        ("eval --text TEXT", "no model to measure"),
        ("eval --text TEXT more", "more is one too many"),
        ("import no --model MODEL --output OUT", "no does not exist"),
        ("import wanda --model MODEL --output OUT", "use hf-maskpro init --method wanda"),
        ("inspect ./no", "./no does not exist"),
        ("inspect TEXT", "is a file"),
        ("push ./no me/mask", "no does not exist; pass the folder of an adapter"),
        ("push TEXT me/mask", "is a file; pass the folder of an adapter"),
        ("push ADAPTER me//mask", "me//mask"),
        ("export --model MODEL --target dense --output OUT", "--target dense merges a mask adapter"),
        ("export --model MODEL --target cpu --output OUT --revision v2", "--revision is v2, of an adapter's"),
    ],
)
def test_incomplete_commands(known, command, line, monkeypatch):
    for heavy in ("hf_maskpro.cli.common", "hf_maskpro.hub", "hf_maskpro.deploy"):
        monkeypatch.setitem(sys.modules, heavy, None)
    (said,) = run(*typed(known, command), code=(1, 2)).stderr.strip().splitlines()
    assert said.startswith("error: ")
    assert line in said


def test_a_gguf_file_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_maskpro.cli.inputs.find_spec", lambda package: None)
    (tmp_path / "model.gguf").write_bytes(b"")
    for verb in ("init", "merge"):
        given = [verb, "--model", tmp_path, "--gguf-file", "model.gguf", "--output", tmp_path / "a"]
        more = ["--method", "magnitude"] if verb == "init" else ["--adapter", tmp_path]
        line = fails(*given, *more)
        assert line == "error: --gguf-file model.gguf needs its extra: pip install 'hf-maskpro[gguf]'."


def test_what_needs_a_text_is_what_needs_data():
    for rule in RULES:
        for refined in ("", "+swaps", "+blocks", "+swaps+blocks"):
            assert needs_text(rule + refined) == needs_data(rule + refined)
    assert not needs_text("./folder")
    assert needs_text("./folder+swaps")
