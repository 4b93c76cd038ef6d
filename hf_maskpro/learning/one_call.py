"""The whole way in one call."""

from itertools import islice
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from ..starts import initialize_masks, random_windows, start_token_of
from ..starts.calibration import SEQ_LEN
from ..tuner import MaskProConfig
from .arguments import MaskProTrainingArguments
from .trainer import MaskProTrainer


def sparsify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    init_mask: str = "sparsegpt+swaps",
    n: int = 2,
    m: int = 4,
    max_steps: int = 0,
    **settings: Any,
) -> PeftModel:
    """
    A model under the best one-shot mask, and if you like a learned one: [`MaskProConfig`], [`random_windows`],
    [`initialize_masks`] and [`MaskProTrainer`] in a row.

    Args:
        model (`PreTrainedModel`): The dense model. Its weights do not change.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `list[dict]` or `str`): Text, in a column `text` or
            `messages`; or the folder or Hub id of such a dataset.
        init_mask (`str`, defaults to `"sparsegpt+swaps"`): The starting mask, as in [`MaskProConfig`].
        n (`int`, defaults to 2): How many of every `m` weights are kept.
        m (`int`, defaults to 4): The size of a group.
        max_steps (`int`, defaults to 0): Steps to learn for; none unless given.
        settings: As for [`MaskProTrainingArguments`], but for `num_train_epochs`. `seed` chooses the calibration
            windows as well; no checkpoints are kept unless `save_strategy` is given.

    Returns:
        [`~peft.PeftModel`]: The model with the mask adapter.

    Raises:
        `ValueError`: if `num_train_epochs` is given; as its parts do, of wrong settings and datasets.
    """
    if "num_train_epochs" in settings:
        raise ValueError(
            f"num_train_epochs is {settings['num_train_epochs']}, and a run is measured in max_steps here; pass these."
        )
    masked = get_peft_model(model, MaskProConfig(n=n, m=m, init_mask=init_mask))
    # Of a stream a trainer wants to know how many steps, though it takes none.
    args = MaskProTrainingArguments(**{"save_strategy": "no"} | settings, max_steps=max(max_steps, 1))
    # Without one a trainer refuses models that a text alone teaches nothing, which only matters to one that learns.
    collator = None if max_steps > 0 else default_data_collator
    trainer = MaskProTrainer(masked, args, train_dataset=dataset, processing_class=tokenizer, data_collator=collator)
    text = torch.stack([row["input_ids"] for row in islice(trainer.train_dataset, 1024)])
    seq_len = min(SEQ_LEN, args.max_length)
    start_token = start_token_of(tokenizer)
    initialize_masks(masked, random_windows(text, seq_len=seq_len, seed=args.seed, start_token=start_token))
    if max_steps > 0:
        trainer.train()
    return masked
