"""Pushing and pulling over a real connection: the real client, in processes of their own, against `hub_server`."""

import hashlib
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments

from .hub_server import Hub


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
            self.process.submit(without_waiting)

    def __call__(self, function, *arguments, **options):
        """What the function, one of this module's, returns there."""
        return self.process.submit(function, *arguments, **options).result()

    def fails(self, function, *arguments, **options) -> str:
        """The error that it ends with there."""
        return self(failure, function, *arguments, **options)


def without_waiting():
    """The client waits between its attempts after a connection was lost."""
    time.sleep = lambda seconds: None


def failure(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{function.__name__}{arguments} did not fail.")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), {"token-of-me": "me", "token-of-you": "you"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def pusher(hub, tmp_path_factory):
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


def push_folder(repository, seed, subfolder):
    model = masked(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, path_in_repo=subfolder)
    return logits(model)


def pull(repository, **options):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), repository, **options))


# What is pushed, by the arguments that pull it, with the logits there.
PUSHED = {
    "model": ("me/mask", {}),
    "revision": ("me/mask", {"revision": "v2"}),
    "private": ("me/secret", {}),
    "subfolder": ("me/many", {"subfolder": "strict"}),
}


@pytest.fixture(scope="module")
def pushed(hub, pusher, checkpoint):
    pusher(push_base, checkpoint)
    return {
        "model": pusher(push_model, "me/mask", 0),
        "revision": pusher(push_model, "me/mask", 1, revision="v2"),
        "private": pusher(push_model, "me/secret", 2, private=True),
        "subfolder": pusher(push_folder, "me/many", 3, "strict"),
    }


def test_every_push_differs(pushed):
    values = list(pushed.values())
    assert all(not np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("name", PUSHED)
def test_another_machine_pulls_the_same_logits(pushed, puller, name):
    repository, options = PUSHED[name]
    assert np.array_equal(puller(pull, repository, **options), pushed[name])
