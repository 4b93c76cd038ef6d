"""The costs on paper, against what was measured."""

from pathlib import Path

import pytest

import cost_model


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("estimator", [cost_model.RESIDUAL, cost_model.LEAN], ids=lambda estimator: estimator.name)
def test_the_layout_is_what_a_step_was_measured_to_add(estimator):
    measured = cost_model.POINTS["added_bytes_per_weight"][estimator.name]
    assert measured == pytest.approx(estimator.added, rel=0.12)


def test_a_whole_process_takes_a_quarter_more_at_most_than_what_is_counted():
    process = cost_model.POINTS["process"]
    assert process["estimator"] == cost_model.LEAN.name
    counted = cost_model.LEAN.memory(process["weights"], process["targets"])
    assert counted < process["bytes"] < 1.35 * counted


def test_a_step_takes_the_parts_that_were_measured_on_a_gpu():
    step, model = cost_model.STEP, cost_model.MODELS["7B"]
    assert model.targets == step["target_weights"]
    assert cost_model.seconds(model, cost_model.RESIDUAL, 1) == pytest.approx(
        step["forward_s"] + step["compiled_s"], rel=0.05
    )


def test_a_decoder_layer_of_a_70b_model_fits_24_gigabytes():
    assert sum(cost_model.block_memory(cost_model.MODELS["70B"]).values()) < 24e9


def test_the_page_shows_what_the_model_says():
    assert cost_model.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
