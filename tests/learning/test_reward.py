"""Learning from scores that have no gradient."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.tuner import MaskProLayer

from ..conftest import tiny_llama
from .test_trainer import arguments, rows, thetas


def minus_loss(model, batch):
    """What the model's own loss lowers, as a score of every example."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)


def learned(folder, reward_fn=None, model=None, n=2, resume=None, **options):
    masked = get_peft_model(model or tiny_llama(), MaskProConfig(n=n, logit_scale=3))
    given = {"max_steps": 6, "learning_rate": 0.5, "baseline": "step"} | options
    trainer = MaskProTrainer(masked, arguments(folder, "residual", **given), rows(), reward_fn=reward_fn)
    trainer.train(resume_from_checkpoint=resume)
    return masked


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_losses_of_examples_as_a_score_move_the_logits_as_the_loss_does(tmp_path, accumulated):
    # Divided by its deviation, a small residual would show how losses are rounded.
    options = {"gradient_accumulation_steps": accumulated, "advantage": "raw", "learning_rate": 5}
    by_loss, by_score = learned(tmp_path, **options), learned(tmp_path, minus_loss, **options)
    assert any(theta.any() for theta in thetas(by_loss))
    for loss, score in zip(thetas(by_loss), thetas(by_score), strict=True):
        torch.testing.assert_close(score, loss, rtol=1e-3, atol=1e-4)
    assert by_score.peft_config["default"].start["training"]["objective"] == "reward"


def test_a_run_by_a_score_resumes_exactly_and_by_that_alone(tmp_path):
    whole = learned(tmp_path, minus_loss, save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = learned(tmp_path / "again", minus_loss, resume=checkpoint)
    assert all(torch.equal(*pair) for pair in zip(thetas(whole), thetas(resumed), strict=True))
    with pytest.raises(ValueError, match="has the objective reward, and this run language-modeling"):
        learned(tmp_path / "again", resume=checkpoint)


def test_a_score_without_a_gradient_rises(tmp_path):
    # A model that knows the examples, and then loses half of its weights.
    model = tiny_llama()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    # Embedding and head could do all of it.
    optimizer = torch.optim.Adam(model.model.layers.parameters(), lr=1e-2)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def accuracy(model, batch):
        found = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        return (found == batch["labels"][:, 1:]).float().mean(1)

    masked = learned(tmp_path, accuracy, model, n=1, max_steps=150, per_device_train_batch_size=32)
    with torch.no_grad():
        after = accuracy(masked.eval(), batch).mean()
        for theta in (layer.maskpro_theta["default"] for layer in masked.modules() if isinstance(layer, MaskProLayer)):
            theta.zero_()
        assert after > accuracy(masked, batch).mean() + 0.05


def test_a_mask_is_drawn_once_however_often_the_model_is_called(tmp_path, monkeypatch):
    drawn = []
    masked = MaskProLayer.masked

    def counted(layer, weight, name, seed=None, *rest):
        drawn.append((layer, seed))
        return masked(layer, weight, name, seed, *rest)

    def length(model, batch):
        return model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False).shape[1] * torch.ones(8)

    monkeypatch.setattr(MaskProLayer, "masked", counted)
    learned(tmp_path, length, max_steps=2, logging_steps=100)
    sampled = [each for each in drawn if each[1] is not None]
    assert len(sampled) == len(set(sampled)) == 2 * 14


@pytest.mark.parametrize(
    ("given", "message"),
    [(torch.tensor(1.0), r"gave a tensor \[\]"), (torch.ones(2, 2), r"gave a tensor \[2, 2\]"), (0.5, "gave float")],
)
def test_what_is_no_score_for_each_example_is_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        learned(tmp_path, lambda model, batch: given)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [("simple", {}), ("residual", {"objective": "distillation"}), ("residual", {"baseline": "cache"})],
)
def test_scores_are_for_residual_alone(tmp_path, estimator, options):
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    with pytest.raises(ValueError, match="reward_fn"):
        MaskProTrainer(masked, arguments(tmp_path, estimator, **options), rows(), reward_fn=minus_loss)
