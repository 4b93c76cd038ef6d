"""What `train` takes besides its own options: a file of options, and every other field of the training arguments."""

import ast
import json
from argparse import ArgumentError
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import did_you_mean
from .verb import UsageError, Verb


if TYPE_CHECKING:
    from ..learning import MaskProTrainingArguments


# What fields are called here that would do nothing by their own name.
INSTEAD = {
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "num_train_epochs": "--max-steps",
    "max_length": "--seq-len",
    "do_eval": "--eval-text",
    "do_predict": "hf-maskpro eval",
}
# As transformers reads them.
TRUTHS = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")


def _transformers(file: str) -> Path:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], file)


def _parsed(file: Path) -> list[ast.stmt]:
    """A file, read and not imported, so that a typo is found before torch is loaded."""
    return ast.parse(file.read_text(encoding="utf-8")).body


def one_of(file: str, name: str, *more: str) -> Callable[[str | None], str | None]:
    """A check that a value is one of those that a class or dictionary of transformers has."""

    def check(value: str | None) -> str | None:
        if value is None:
            return None
        (found,) = (
            node
            for node in _parsed(_transformers(file))
            if (isinstance(node, ast.ClassDef) and node.name == name)
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name)
        )
        values = [node.value for node in ast.walk(found) if isinstance(node, ast.Constant)]
        known = {value for value in values if isinstance(value, str) and value.isidentifier()} | {*more}
        if value not in known:
            raise typer.BadParameter(f"transformers knows no {value}.{did_you_mean(value, known)}")
        return value

    return check


@cache
def training_fields() -> dict[str, str]:
    """The fields of `MaskProTrainingArguments`, and what each may be."""
    own = Path(__file__).parents[1] / "learning"
    return {
        field.target.id: ast.unparse(field.annotation).removesuffix(" | None")
        for file in (_transformers("training_args.py"), *own.glob("*.py"))
        for known in _parsed(file)
        if isinstance(known, ast.ClassDef) and known.name.endswith("Arguments")
        for field in known.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def expected(kind: str, value: str) -> str | None:
    """What a field so annotated may be, if a value is not; of other kinds the arguments themselves know more."""
    if kind in ("int", "float"):
        try:
            fits = (int(value) if kind == "int" else float(value)) >= 0
        except ValueError:
            fits = False
        return None if fits else f"a {'whole ' * (kind == 'int')}number, 0 or more"
    if kind == "bool":
        # It may stand alone.
        return None if value.lower() in ("", *TRUTHS) else "true or false"
    if "dict" in kind and value.startswith("{"):
        try:
            json.loads(value)
        except ValueError:
            return """JSON, as '{"name": 1}'"""
    if kind.startswith("Literal"):
        known = ast.literal_eval(kind.removeprefix("Literal"))
        return None if value in known else " or ".join(known)
    return None


class TrainVerb(Verb):
    """The verb whose options may stand in a file, and that hands those it has not to the training arguments."""

    allow_extra_args = True
    ignore_unknown_options = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = self._of_file(ctx, args) + args
        try:
            rest = super().parse_args(ctx, [*args])
        except typer.BadParameter:
            # What is missing may have been mistyped.
            self._check_others(ctx, self.make_parser(ctx).parse_args(args)[1])
            raise
        if not ctx.resilient_parsing:
            self._check_others(ctx, ctx.args)
        return rest

    def options_of_names(self) -> dict[str, str]:
        fields = {name: f"--{name.replace('_', '-')}" for name in training_fields()}
        return fields | INSTEAD | super().options_of_names()

    def _check_others(self, ctx: Any, words: list[str]) -> None:
        """Refuse words that are none of the verb's own, unless they set fields of the training arguments."""
        if words and not words[0].startswith("--"):
            raise UsageError(f"{words[0]} belongs to no option.", ctx)
        fields = training_fields()
        for place, word in enumerate(words):
            if word.startswith("--"):
                option, _, value = word.partition("=")
                more = takewhile(lambda other: not other.startswith("--"), words[place + 1 :])
                self._check(ctx, option, " ".join([value, *more]).strip(), fields)

    def _check(self, ctx: Any, option: str, value: str, fields: dict[str, str]) -> None:
        """Refuse an option that neither the verb nor the training arguments have, or a value that cannot be one."""
        name = option.removeprefix("--").replace("-", "_")
        if name in INSTEAD:
            raise UsageError(f"{option} is {INSTEAD[name]} here.", ctx)
        if name not in fields:
            known = [*self._own(), *(f"--{field.replace('_', '-')}" for field in fields.keys() - INSTEAD.keys())]
            raise UsageError(f"No such option: {option}.{did_you_mean(option, known)}", ctx)
        if wanted := expected(fields[name], value):
            raise UsageError(f"{option} is {value or 'empty'}; give {wanted}.", ctx)

    def _own(self) -> dict[str, Any]:
        return {option: known for known in self.params for option in (*known.opts, *known.secondary_opts)}

    def _of_file(self, ctx: Any, args: list[str]) -> list[str]:
        """What the file of `--config` says, as if it had been typed first; without what is typed."""
        given = {word.partition("=")[0] for word in args if word.startswith("--")}
        if ctx.resilient_parsing or "--config" not in given:
            return []
        place = next(i for i, word in enumerate(args) if word.partition("=")[0] == "--config")
        file = args[place].partition("=")[2] or "".join(args[place + 1 : place + 2])
        own = self._own()
        words: list[str] = []
        for key, value in _read(file).items():
            option = f"--{key.replace('_', '-')}"
            known = own.get(option)
            names = {option} if known is None else {*known.opts, *known.secondary_opts}
            if value is None or given & names:
                continue
            if known is not None and isinstance(value, bool):
                others = known.secondary_opts if option in known.opts else known.opts
                words += [option] if value else others[:1]
            elif isinstance(value, list):
                many = [str(each) for each in value]
                if known is None:
                    words += [option, *many]
                elif known.multiple:
                    words += [f"{option}={each}" for each in many]
                else:
                    words.append(f"{option}={','.join(many)}")
            else:
                words.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
        return words


def _read(file: str) -> dict[str, Any]:
    """The options of a YAML file."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no options; write one a line, as in max_steps: 400.")
    return {str(key): value for key, value in content.items()}


def training_arguments(known: dict[str, Any], words: list[str]) -> "MaskProTrainingArguments":
    """The arguments of a run: what the verb's own options say, and what else was typed."""
    from transformers import HfArgumentParser

    from ..learning import MaskProTrainingArguments

    parser = HfArgumentParser(MaskProTrainingArguments, allow_abbrev=False, exit_on_error=False)
    parser.set_defaults(**known)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    except ArgumentError as error:
        raise ValueError(f"{str(error.argument_name).rpartition('/')[2]}: {error.message}.") from error
    except ValueError as error:
        # What was found may stand in further lines.
        raise ValueError(" ".join(str(error).split())) from error
