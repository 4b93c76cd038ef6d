"""The card of a checkpoint into which a mask adapter was merged."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..tuner.card import BEGIN, CARD_FILE, END, Saved, hub_id, is_causal, last_stage, pattern_of, render, save_card


def write_merged_card(folder: Path, saved: Saved) -> None:
    """Write the card of a checkpoint into which a mask adapter was merged."""
    data = ModelCardData(
        base_model=hub_id(saved["base_model_name_or_path"]),
        library_name="transformers",
        pipeline_tag="text-generation" if is_causal(saved) else None,
        tags=["maskpro", "n-m-sparsity", pattern_of(saved)],
    )
    body = render(Path(__file__).with_name("merged_card.md"), saved, layers=len(last_stage(saved)["groups_changed"]))
    save_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{body}\n{END}\n"), folder / CARD_FILE)
