"""A merged checkpoint that vLLM serves in FP8 + 2:4, by torchao's configuration."""

import json
import shutil
from pathlib import Path

from ..tuner.files import weight_files
from .check import check_sparsity
from .folders import new_folder
from .merge import checkpoint_folder, copy_companions, merge


ONNX_FILE, TORCHAO_FILE = "model.onnx", "torchao_config.json"


def to_torchao_fp8(
    model: str | Path, adapter: str | Path | None, output: str | Path, overwrite: bool = False
) -> dict[str, float]:
    """
    Write a merged 2:4 checkpoint with the torchao configuration by which vLLM serves it in FP8 + 2:4.

    The weights stay as they are and are converted when they are loaded, on Hopper or newer: torchao 0.18 cannot save
    FP8 + 2:4 weights to safetensors.

    Args:
        model (`str` or `Path`): The base model's checkpoint, or without `adapter` the merged one: a folder or Hub id.
        adapter (`str` or `Path`, *optional*): The mask adapter: a folder or a Hub id.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`): Replace a folder that is in use.

    Returns:
        `dict[str, float]`: Share of zeros by linear layer.

    Raises:
        `ValueError`: if a linear layer besides the output head is not 2:4: torchao would drop weights of it.
    """
    try:
        from torchao.core.config import config_to_dict
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        from torchao.quantization.quantize_.workflows import Float8PackingFormat
    except ImportError as error:
        raise ValueError("FP8 export needs its extra: pip install 'hf-maskpro[fp8]'.") from error
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    )
    with new_folder(output, overwrite) as folder:
        if adapter is None:
            base = checkpoint_folder(model)
            files = weight_files(base)
            for file in files:
                shutil.copyfile(file, folder / file.name)
            copy_companions(base, folder, files)
        else:
            merge(model, adapter, folder)
        report = check_sparsity(folder, 2, 4)
        (folder / TORCHAO_FILE).write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    return report
