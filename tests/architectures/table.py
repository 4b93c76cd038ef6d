"""
The architectures that are tested, each as a tiny random model. `python -m tests.architectures.table` writes the table
of docs/supported.md from it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel


PAGE = Path(__file__).parents[2] / "docs" / "supported.md"
BEGIN, END = "<!-- made by tests/architectures/table.py: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Architecture:
    """
    A tiny random model and what is known of it.

    Attributes:
        name (`str`): What people call it.
        model_class (`type`): Its class in transformers.
        config (`PreTrainedConfig`): Its configuration.
        batch (`dict`): Tensors that its forward takes, a row an example, with the labels that its loss needs.
        exclude (`str`, *optional*): What `exclude_modules` has to say.
        why (`str`): Why it has to, in words of the documentation.
        at_once (`tuple[str, ...]`): The layers that calibration gathers in one pass rather than layer by layer.
        walked (`bool`): Whether it has a list of layers to walk; else all of them are gathered in one pass.
        with_loss (`dict`): Arguments that make its forward return a loss.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    batch: dict[str, torch.Tensor]
    exclude: str | None = None
    why: str = ""
    at_once: tuple[str, ...] = ()
    walked: bool = True
    with_loss: dict[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether it answers in tokens."""
        return self.model_class.can_generate()


_TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_FALCON = {name: value for name, value in _TEXT.items() if name != "head_dim"}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_GEMMA = _TEXT | {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "tie_word_embeddings": True,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 24, "suppress_tokens": None}
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
_TO_TEXT = _SPECIAL | {"decoder_start_token_id": 1}
# What stands for an image, and what is around it.
_IMAGE, _OPENING, _CLOSING = 35, 36, 37

_generator = torch.Generator().manual_seed(0)
_IDS = torch.randint(3, 34, (4, 12), generator=_generator)
_PIXELS = torch.randn(4, 3, 8, 8, generator=_generator)
_SOUND = torch.randn(4, 8, 20, generator=_generator)
_CLASSES = {"labels": torch.tensor([0, 1, 2, 0])}
_CAUSAL = {"input_ids": _IDS, "labels": _IDS}
# As many tokens as the tiny image has patches.
_WITH_IMAGE = torch.cat([torch.tensor([[_OPENING] + 4 * [_IMAGE] + [_CLOSING]]).expand(4, -1), _IDS], 1)
_LLAVA = {"input_ids": _WITH_IMAGE, "labels": _WITH_IMAGE, "pixel_values": _PIXELS}
_HEAD = "the classifier, a head of its own"

ARCHITECTURES = [
    Architecture("Llama", transformers.LlamaForCausalLM, transformers.LlamaConfig(**_TEXT), _CAUSAL),
    Architecture("Mistral", transformers.MistralForCausalLM, transformers.MistralConfig(**_TEXT), _CAUSAL),
    Architecture("Qwen3", transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**_TEXT), _CAUSAL),
    Architecture("Phi", transformers.PhiForCausalLM, transformers.PhiConfig(**_TEXT), _CAUSAL),
    Architecture("Gemma 3, tied", transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**_GEMMA), _CAUSAL),
    Architecture(
        "Gemma 3 with images",
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config=_GEMMA,
            vision_config=_VISION,
            mm_tokens_per_image=4,
            image_token_index=_IMAGE,
            boi_token_index=_OPENING,
            eoi_token_index=_CLOSING,
        ),
        _LLAVA | {"token_type_ids": (_WITH_IMAGE == _IMAGE).long()},
        exclude=r".*vision_tower.*\.head\..*",
        why="the head of the vision tower: one of its layers is read and never called",
    ),
    Architecture("GPT-2", transformers.GPT2LMHeadModel, transformers.GPT2Config(**_GPT2 | _SPECIAL), _CAUSAL),
    Architecture(
        "OPT",
        transformers.OPTForCausalLM,
        transformers.OPTConfig(**_TEXT, ffn_dim=32, word_embed_proj_dim=8),
        _CAUSAL,
        at_once=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    Architecture("GPT-NeoX", transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**_TEXT), _CAUSAL),
    Architecture("Falcon", transformers.FalconForCausalLM, transformers.FalconConfig(**_FALCON), _CAUSAL),
    Architecture(
        "Mixtral, with its experts",
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**_TEXT, num_local_experts=4),
        _CAUSAL,
    ),
    Architecture(
        "Qwen3-MoE, with its experts",
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**_TEXT, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        _CAUSAL,
    ),
    Architecture(
        "GPT-OSS, experts transposed",
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            **_TEXT,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        _CAUSAL,
    ),
    Architecture(
        "Mamba",
        transformers.MambaForCausalLM,
        transformers.MambaConfig(**_TEXT | {"state_size": 4, "time_step_rank": 4}),
        _CAUSAL,
        exclude=r".*\.dt_proj",
        why="`dt_proj`, which is read and never called",
    ),
    Architecture(
        "Bamba, a hybrid",
        transformers.BambaForCausalLM,
        transformers.BambaConfig(**_TEXT, **_MAMBA, attn_layer_indices=[1]),
        _CAUSAL,
    ),
    Architecture(
        "T5",
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**_T5 | _TO_TEXT),
        {"input_ids": _IDS, "labels": _IDS[:, :7].contiguous()},
    ),
    Architecture(
        "BART",
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(**_BART | _TO_TEXT, max_position_embeddings=64),
        {"input_ids": _IDS, "labels": _IDS[:, :7].contiguous()},
    ),
    Architecture(
        "Whisper",
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig(**_BART | _WHISPER | _TO_TEXT, begin_suppress_tokens=None),
        {"input_features": _SOUND, "labels": _IDS[:, :7].contiguous()},
    ),
    Architecture(
        "Llama, classifying",
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(**_TEXT, num_labels=3),
        {"input_ids": _IDS} | _CLASSES,
        exclude="score",
        why=_HEAD,
    ),
    Architecture(
        "BERT, classifying",
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**_TEXT, num_labels=3),
        {"input_ids": _IDS} | _CLASSES,
        exclude="classifier",
        why=_HEAD,
        at_once=("bert.pooler.dense",),
    ),
    Architecture(
        "ModernBERT, classifying",
        transformers.ModernBertForSequenceClassification,
        transformers.ModernBertConfig(**_TEXT, num_labels=3, local_attention=4, cls_token_id=1, sep_token_id=1),
        {"input_ids": _IDS} | _CLASSES,
        exclude="classifier",
        why=_HEAD,
        at_once=("head.dense",),
    ),
    Architecture(
        "ALBERT, layers shared",
        transformers.AlbertForMaskedLM,
        transformers.AlbertConfig(**_TEXT, embedding_size=16),
        _CAUSAL,
        walked=False,
    ),
    Architecture(
        "ViT, classifying",
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**_VISION, num_labels=3),
        {"pixel_values": _PIXELS} | _CLASSES,
        exclude="classifier",
        why=_HEAD,
    ),
    Architecture(
        "CLIP",
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config=_TEXT | {"projection_dim": 16},
            vision_config=_VISION | {"projection_dim": 16},
            projection_dim=16,
        ),
        {"input_ids": _IDS, "pixel_values": _PIXELS},
        at_once=("text_projection", "visual_projection"),
        with_loss={"return_loss": True},
    ),
    Architecture(
        "LLaVA",
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            image_token_index=_IMAGE,
            # Else its last layer is for nothing.
            vision_feature_layer=-1,
        ),
        _LLAVA,
        at_once=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
]


def markdown() -> str:
    """The table as the documentation shows it."""
    lines = ["| model | class | left dense by `exclude_modules` | calibrated | compared by |", "|---|---|---|---|---|"]
    for known in ARCHITECTURES:
        calibrated = "layer by layer" if known.walked else "in one pass"
        if known.at_once:
            calibrated += "; in one pass " + ", ".join(f"`{name}`" for name in known.at_once)
        compared = "outputs, `generate`" if known.generates else "outputs"
        lines.append(
            f"| {known.name} | `{known.model_class.__name__}` | {known.why or 'nothing'} | {calibrated} | {compared} |"
        )
    return "\n".join(lines)


def page(text: str) -> str:
    """A page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
