import pytest
import torch

from hf_maskpro.subset.native import compiled, multiplies_in


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


def test_a_source_becomes_a_library(source):
    try:
        library = compiled(source, "answers")
    except ValueError as error:
        pytest.skip(str(error))
    assert library.answer() == 42


def test_a_compiler_with_arguments(source, monkeypatch):
    monkeypatch.setenv("CXX", "env VARIABLE='a b' g++")
    try:
        assert compiled(source, "answers").answer() == 42
    except ValueError as error:
        assert "is not there" not in str(error)  # noqa: PT017, a machine without g++
        pytest.skip(str(error))


def test_an_empty_name_is_none(source, monkeypatch):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"^answers are compiled at first use, and g\+\+ is not there\.$"):
        compiled(source, "answers")


def test_a_compiler_that_says_nothing(source, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(ValueError, match=r"^answers cannot be compiled here: /bin/false exits with 1$"):
        compiled(source, "answers")


def test_a_compiler_that_leaves_nothing_behind(source, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(ValueError, match=r"^answers cannot be compiled here: .*library\.so"):
        compiled(source, "answers")


def test_a_compiler_that_cannot_be_run(source, monkeypatch):
    monkeypatch.setenv("CXX", str(source))
    with pytest.raises(ValueError, match=r"^answers cannot be compiled here: .*Permission denied"):
        compiled(source, "answers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_goes_by_the_instructions_of_the_cpu(dtype, monkeypatch):
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has in (False, True):
        for other, name in known.items():
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda has=has, other=other: has == (other == dtype))
        assert multiplies_in(dtype) == has
        assert multiplies_in(torch.float32)


def test_without_mkldnn_there_are_plain_loops(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [multiplies_in(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [False, False, True]
