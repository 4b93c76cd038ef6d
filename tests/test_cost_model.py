"""The costs on paper, against what was measured."""

from pathlib import Path

import pytest

import cost_model


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("check", cost_model.checks(), ids=lambda check: check.what)
def test_what_is_computed_is_near_what_was_measured(check):
    """Of memory what a layer holds is nearly all; of time attention and waiting for the host are left out."""
    tolerance = 0.2 if check.unit == "bytes a target weight" else 0.35
    assert check.measured == pytest.approx(check.computed, rel=tolerance)


def test_no_constant_is_made_of_what_it_is_checked_by(monkeypatch):
    """Twice as much measured is as much computed."""
    computed = [check.computed for check in cost_model.checks()]
    monkeypatch.setitem(cost_model.STEP, "forward_s", 2 * cost_model.STEP["forward_s"])
    points = cost_model.POINTS
    doubled = {name: 2 * value for name, value in points["added_bytes_per_weight"].items()}
    monkeypatch.setitem(points, "added_bytes_per_weight", doubled)
    monkeypatch.setitem(points, "run", points["run"] | {"seconds": 2 * points["run"]["seconds"]})
    monkeypatch.setitem(points, "process", points["process"] | {"bytes": 2 * points["process"]["bytes"]})
    again = cost_model.checks()
    assert [check.computed for check in again] == computed
    measured = [check.measured for check in again]
    monkeypatch.undo()
    assert measured == [2 * check.measured for check in cost_model.checks()]
    assert len(measured) >= 3


def test_a_decoder_layer_of_a_70b_model_fits_24_gigabytes():
    assert sum(cost_model.block_memory(cost_model.MODELS["70B"]).values()) < 24e9


def test_readme_and_the_page_on_large_models_show_what_the_model_says():
    assert cost_model.memory_table() in (ROOT / "README.md").read_text(encoding="utf-8")
    seven = cost_model.MODELS["7B"]
    page = (ROOT / "docs" / "large-models.md").read_text(encoding="utf-8")
    for make in (cost_model.residual, cost_model.lean, cost_model.simple):
        assert f"| {make(2).memory(seven.weights, seven.targets) / 1e9:.1f} GB |" in page


@pytest.mark.parametrize("table", [cost_model.table, cost_model.check_table])
def test_the_page_shows_what_the_model_says(table):
    assert table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
