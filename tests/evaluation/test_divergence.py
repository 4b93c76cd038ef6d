import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from hf_maskpro import MaskProConfig, perplexity
from hf_maskpro.evaluation import against_dense, divergence

from ..conftest import tiny_llama
from .test_perplexity import TEXT


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def dense():
    """A tiny model that is surer than such a model is, so that a mask costs it something."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 40
    return model


def masked(**options):
    return get_peft_model(dense(), MaskProConfig(**options))


@pytest.mark.parametrize("stride", [None, 5])
def test_the_divergence_equals_its_definition(tokenizer, stride):
    model = masked().eval()
    total, count, seen = 0.0, 0, 0
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    for start in range(0, 35, stride or 16):
        window = ids[:, start : start + 16]
        with torch.no_grad():
            q = model(input_ids=window).logits[0, :-1].double().softmax(-1)
            p = dense()(input_ids=window).logits[0, :-1].double().softmax(-1)
        kl = (p * (p / q).log()).sum(-1)
        fresh = kl if stride is None else kl[max(0, seen - start - 1) :]
        total, count, seen = total + fresh.sum(), count + len(fresh), start + 16
    figures = {"seq_len": 16, "stride": stride, "max_tokens": seen}
    assert divergence(model, tokenizer, TEXT, **figures) == pytest.approx((total / count).item(), rel=1e-4)
    assert divergence(model, tokenizer, TEXT, **figures, batch_size=3) == pytest.approx(
        (total / count).item(), rel=1e-4
    )


def test_a_mask_that_drops_nothing_does_not_diverge(tokenizer):
    base = dense()
    with torch.no_grad():
        for layer in base.model.modules():
            if isinstance(layer, torch.nn.Linear):
                # Two of four are zero before a mask drops the two smallest.
                layer.weight[:, ::2] = 0
    model = get_peft_model(base, MaskProConfig())
    report = against_dense(model, tokenizer, {"text": TEXT}, seq_len=16)
    assert report["texts"]["text"]["kl"] == 0
    assert report["elsewhere"] == 1


def test_each_text_is_measured_as_by_itself(tokenizer, starting_checkpoint):
    model, starting = masked(), AutoTokenizer.from_pretrained(starting_checkpoint)
    texts = {"a": TEXT, "b": " ".join(reversed(TEXT.split())), "c": "w3 w4 w5 " * 20}
    how = {"seq_len": 16, "max_tokens": 40, "stride": 5, "batch_size": 2}
    for known in (tokenizer, starting):
        report = against_dense(model, known, texts, home="b", **how)
        for name, text in texts.items():
            figures = report["texts"][name]
            assert figures["perplexity"] == pytest.approx(perplexity(model, known, text, **how))
            assert figures["dense_perplexity"] == pytest.approx(perplexity(dense(), known, text, **how))
            assert figures["kl"] == divergence(model, known, text, **how) > 0
        ratios = {
            name: figures["perplexity"] / figures["dense_perplexity"] for name, figures in report["texts"].items()
        }
        assert report["at_home"] == ratios["b"]
        assert report["elsewhere"] == pytest.approx((ratios["a"] * ratios["c"]) ** 0.5)
    assert "at_home" not in against_dense(model, tokenizer, texts, **how)
    assert "elsewhere" not in against_dense(model, tokenizer, {"b": TEXT}, "b", **how)


def test_the_model_is_left_as_it_was(tokenizer, tmp_path):
    """A mask that was loaded for inference gets no memory for logits, and a trained one stays so."""
    masked().save_pretrained(tmp_path)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(dense(), tmp_path, is_trainable=trainable).train(trainable)
        before = {name: (p.requires_grad, p.stride()) for name, p in model.named_parameters()}
        assert any(needs for needs, _ in before.values()) == trainable
        divergence(model, tokenizer, TEXT, seq_len=16)
        assert {name: (p.requires_grad, p.stride()) for name, p in model.named_parameters()} == before
        assert model.training == trainable


def test_weights_that_are_saved_beside_the_mask_are_not_the_dense_model_s(tokenizer):
    model = masked(modules_to_save=["norm"])
    expected = perplexity(dense(), tokenizer, TEXT, seq_len=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(3)
    report = against_dense(model, tokenizer, {"text": TEXT}, seq_len=16)
    assert report["texts"]["text"]["dense_perplexity"] == pytest.approx(expected)


def test_only_one_window_is_in_float32(tokenizer):
    model, sizes = masked().to(torch.bfloat16), []
    original = torch.Tensor.float

    def noted(tensor):
        sizes.append(tensor.shape)
        return original(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", noted)
        divergence(model, tokenizer, TEXT, seq_len=16, batch_size=3)
    assert {shape for shape in sizes if shape[-1] == 34} == {(15, 34)}


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="the model has no mask adapter"):
        divergence(dense(), tokenizer, TEXT, seq_len=16)
    with pytest.raises(ValueError, match="home is 'b', which is none of the texts: a"):
        against_dense(masked(), tokenizer, {"a": TEXT}, "b", seq_len=16)
    with pytest.raises(ValueError, match="the text has 2 tokens"):
        against_dense(masked(), tokenizer, {"a": "w1 w2"}, seq_len=16)
