"""The ONNX graph of a merged model, for TensorRT."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .check import sparse_weights
from .folders import new_folder
from .merge import drop_sparsity_config


ONNX_FILE, TORCHAO_FILE = "model.onnx", "torchao_config.json"
ONNX_TOLERANCE = 1e-3


class _Logits(nn.Module):
    """A language model as a function of tokens, without the cache of decoding."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def to_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Write the float32 ONNX graph of a merged 2:4 model, from tokens to logits, with its zeros in the initialisers.

    The graph is checked with ONNX Runtime before it takes its place on disk. Its logits are compared on random tokens
    of another shape than it was traced with, and its products with a 2:4 operand must be as many as in the model.

    Args:
        model (`PreTrainedModel`): The merged model. It is moved to the CPU in float32.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved beside the graph.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`): Replace a folder that is in use.

    Returns:
        `dict[str, Any]`: The number of 2:4 `layers`, and `logits_differ`, the largest difference of the logits.

    Raises:
        `ValueError`: if no layer is 2:4, or the graph differs from the model.
    """
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise ValueError("ONNX export needs its extra: pip install 'hf-maskpro[onnx]'.") from error
    layers = len(sparse_weights(model, 2, 4))
    if not layers:
        raise ValueError("no linear layer of the model is 2:4; merge a 2:4 mask adapter first.")
    wrapped = _Logits(model.float().cpu()).eval()
    with new_folder(output, overwrite) as folder:
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            wrapped,
            _tokens(model, 2, 8),
            folder / ONNX_FILE,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
            dynamo=True,
            verbose=False,
        )
        found = sum(map(_has_sparse_operand, onnx_ir.load(folder / ONNX_FILE).graph))
        if found < layers:
            raise ValueError(f"the graph has {found} products with a 2:4 operand, the model {layers} 2:4 layers.")
        ids, mask = _tokens(model, 3, 11)
        session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        differ = (torch.from_numpy(logits) - wrapped(ids, mask)).abs().max().item()
        if not differ <= ONNX_TOLERANCE:
            raise ValueError(
                f"the graph's logits differ from the model's by {differ:.2g}, more than {ONNX_TOLERANCE}."
            )
        model.config.save_pretrained(folder)
        drop_sparsity_config(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {"layers": layers, "logits_differ": differ}


def _tokens(model: PreTrainedModel, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and a mask that pads the end of the last row."""
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return ids, mask


def _has_sparse_operand(node: Any) -> bool:
    """Whether a node of a graph multiplies by a constant that is 2:4 along the dimension that is summed over."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    operand = node.inputs[1]
    if operand.const_value is None or len(operand.shape) != 2:
        return False
    # [in_features, out_features]: constant folding has transposed it.
    weight = torch.tensor(operand.const_value.numpy())
    return bool(sparse_weights({"operand.weight": weight.T}, 2, 4))
