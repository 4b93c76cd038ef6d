"""Every architecture of the table through the whole life of a mask."""

import copy

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import default_data_collator

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, check_sparsity, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.learning.arguments import ESTIMATORS
from hf_maskpro.subset import mask_of
from hf_maskpro.tuner import masked_layers

from .table import ARCHITECTURES, PAGE, page


def outputs(model, known):
    """What a model makes of the batch, and the tokens that it goes on with."""
    with torch.no_grad():
        found = model(**known.batch)
        tensors = [value for value in found.to_tuple() if isinstance(value, torch.Tensor)]
        if known.generates:
            inputs = {name: value for name, value in known.batch.items() if name != "labels"}
            tensors.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
    return tensors


def equal(these, those):
    return len(these) == len(those) and all(map(torch.equal, these, those))


def calibrated(base, known, rule, caplog):
    """A model with a starting mask, whose weights are as before."""
    caplog.clear()
    model = get_peft_model(base, MaskProConfig(init_mask=rule, exclude_modules=known.exclude))
    initialize_masks(model, [known.batch])
    layers = masked_layers(model)
    for layer in layers.values():
        assert (mask_of(layer.initial_codes("default"), 4).sum(1) == 2).all()
    assert "saw no data" not in caplog.text
    assert "does not reach" not in caplog.text
    at_once = bool(known.at_once) or not known.walked
    assert ("in one pass" in caplog.text) == (at_once and rule != "wanda")
    assert all(name in caplog.text for name in known.at_once if rule != "wanda")
    return model


def train(model, known, estimator, folder):
    rows = [
        {name: value[i] for name, value in known.batch.items()} for i in range(len(next(iter(known.batch.values()))))
    ]
    args = MaskProTrainingArguments(
        output_dir=str(folder), estimator=estimator, max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        learning_rate={"simple": 5.0, "residual": 100.0}.get(estimator),
    )  # fmt: skip
    collate = lambda rows: default_data_collator(rows) | known.with_loss  # noqa: E731
    MaskProTrainer(model, args, train_dataset=rows, data_collator=collate).train()


def live(known, folder, tmp_path, caplog):
    """All of a mask's life, over the checkpoint of an architecture in a folder."""
    load = known.model_class.from_pretrained
    base = load(folder).eval()
    dense, weights = outputs(base, known), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    calibrated(base, known, "wanda", caplog).unload()
    model = calibrated(base, known, "sparsegpt+swaps", caplog)

    layers = masked_layers(model).values()
    start = [layer.initial_mask("default") for layer in layers]
    for estimator in ESTIMATORS:
        # Logits that one has moved far would leave the next no gradient.
        for layer in layers:
            layer.maskpro_theta["default"].data.zero_()
        train(model, known, estimator, tmp_path / "run")
        thetas = [layer.maskpro_theta["default"] for layer in layers]
        assert all(theta.isfinite().all() for theta in thetas)
        # Who learns by the layers' own gradient reaches all of them.
        assert estimator != "simple" or all(theta.any() for theta in thetas)
        assert not equal([layer.learned_mask("default") for layer in layers], start), estimator
    model.eval()
    masked = outputs(model, known)
    assert not equal(masked, dense)

    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    paths = {
        "PEFT": lambda: PeftModel.from_pretrained(load(folder), adapter),
        "PEFT, low memory": lambda: PeftModel.from_pretrained(load(folder), adapter, low_cpu_mem_usage=True),
        "PEFT, auto": lambda: AutoPeftModel.from_pretrained(adapter, dtype="auto"),
        "transformers": lambda: load(adapter),
    }
    for name, path in paths.items():
        assert equal(outputs(path().eval(), known), masked), name
    loaded = load(folder)
    loaded.load_adapter(adapter)
    assert equal(outputs(loaded.eval(), known), masked)

    report = merge(folder, adapter, tmp_path / "merged")
    assert len(report) == len(layers)
    assert equal(outputs(load(tmp_path / "merged").eval(), known), masked)
    merged = model.merge_and_unload(safe_merge=True)
    assert equal(outputs(merged, known), masked)
    check_sparsity(merged, 2, 4, list(report))
    assert all(torch.equal(tensor, weights[name]) or name in report for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("known", ARCHITECTURES, ids=lambda known: known.name)
def test_a_mask_lives_on_every_architecture(known, tmp_path, caplog, monkeypatch):
    # Pictures of the runs would take a quarter of the time.
    monkeypatch.setattr("hf_maskpro.learning.trainer.plot_run", lambda *arguments: None)
    torch.manual_seed(0)
    # A configuration of the table serves other tests, and models write into theirs.
    model = known.model_class(copy.deepcopy(known.config))
    for parameter in model.parameters():
        # Behind a projection that is zero at first, as Gemma 3's of images, no mask would show.
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "base")
    live(known, tmp_path / "base", tmp_path, caplog)


def test_the_page_shows_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
