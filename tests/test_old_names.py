"""Modules that have moved can be imported by their old names for one release."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("hf_maskpro.initialization", "hf_maskpro.starts", "random_windows"),
        ("hf_maskpro.trainer", "hf_maskpro.learning", "MaskProTrainer"),
        ("hf_maskpro.export", "hf_maskpro.deploy", "to_onnx"),
        ("hf_maskpro.packed", "hf_maskpro.deploy.packed", "PackedLinear"),
        ("hf_maskpro.benchmark", "hf_maskpro.deploy.bench", "compare"),
    ],
)
def test_an_old_name_warns_and_gives_the_same(monkeypatch, old, new, name):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"{old} is now {new};"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)


def test_files_of_a_room_can_be_imported_by_its_old_name():
    assert importlib.import_module("hf_maskpro.initialization.walk").walk.__name__ == "walk"
