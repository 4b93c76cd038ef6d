"""What every room that reads a text agrees on: its tokens, and how long a window may be."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def tokens_after_start(
    tokenizer: PreTrainedTokenizerBase, text: str, start_id: int | None, is_first: bool = True
) -> list[int]:
    """
    The tokens of a text, or of a piece of it, without the start token that its windows will begin with, if there is
    one.
    """
    known = tokenizer(text, add_special_tokens=start_id is None, verbose=False).input_ids
    # A text may spell its start token out, as chat templates do.
    return known[1:] if is_first and start_id is not None and known[:1] == [start_id] else known


def check_length(config: PreTrainedConfig, seq_len: int, remedy: str = "lower seq_len") -> None:
    """
    Refuse windows that are longer than a model has positions: learned ones end in an index error there, and rotary
    ones in a figure that says nothing.

    Args:
        config (`PreTrainedConfig`): The configuration of the model.
        seq_len (`int`): Length of a window, in tokens.
        remedy (`str`): What the error advises.

    Raises:
        `ValueError`: if they are.
    """
    # Not every architecture counts positions.
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"windows of {seq_len:,} tokens exceed the model's {positions:,} positions; {remedy}.")
