"""Tiny, randomly initialised models of many architectures, for tests of which rows get which task's weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as T
from torch import Tensor, nn

Batch = dict[str, Any]
VOCABULARY, WIDTH, BATCH = 64, 16, 3

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER = {**_SIZES, "intermediate_size": 20, "max_position_embeddings": 32, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {**_SIZES, "intermediate_size": 20, "num_key_value_heads": 1, "max_position_embeddings": 64}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "pad_token_id": 1,
    "dropout": 0.0,
}
_VISION = {**{k: v for k, v in _SIZES.items() if k != "vocab_size"}, "intermediate_size": 20, "image_size": 16}
_VISION |= {"patch_size": 8}
_MOE = {**_DECODER, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass
class Architecture:
    """One line of the matrix.

    Attributes:
        kind: of model, for the table in the documentation.
        make: the model. batch: its arguments for ``BATCH`` samples of a length.
        targets: modules to adapt. exclude: not these.
        refused: what the error for a mixed batch says; None where a mixed batch must be right.
        lengths: of the batches that are tried: a multiple of ``BATCH``, and ``BATCH`` itself.
        generates: whether ``generate`` is tried as well.
    """

    kind: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    targets: str | list[str] = "all-linear"
    exclude: str | None = None
    refused: str | None = None
    lengths: tuple[int, ...] = (6, 3)
    generates: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def tokens(length: int) -> Batch:
    return {"input_ids": torch.randint(5, VOCABULARY, (BATCH, length))}


def both(length: int) -> Batch:
    return {**tokens(length), "decoder_input_ids": torch.randint(5, VOCABULARY, (BATCH, length))}


def images(side: int = 16) -> Callable[[int], Batch]:
    return lambda length: {"pixel_values": torch.randn(BATCH, 3, side, side)}


def features(width: int, frames: int = 16, name: str = "input_features") -> Callable[[int], Batch]:
    return lambda length: {name: torch.randn(BATCH, width, frames)}


def waves(length: int) -> Batch:
    return {"input_values": torch.randn(BATCH, 400)}


def encoder(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(T, model)(getattr(T, config)(**options))


def text_encoder(name: str, head: str = "ForSequenceClassification", **options: Any) -> Architecture:
    return Architecture("text encoder", encoder(f"{name}{head}", f"{name}Config", **_ENCODER, **options), tokens)


def decoder(
    name: str, head: str = "ForCausalLM", kind: str = "decoder", exclude: str | None = None, **options: Any
) -> Architecture:
    model = encoder(f"{name}{head}", f"{name}Config", **{**_DECODER, **options})
    return Architecture(kind, model, tokens, exclude=exclude, generates=True)


def seq2seq(name: str, head: str = "ForConditionalGeneration", **options: Any) -> Architecture:
    sizes = {**_BART, **options}
    return Architecture("encoder-decoder", encoder(f"{name}{head}", f"{name}Config", **sizes), both, generates=True)


class SequenceFirst(nn.Module):
    """PyTorch's own encoder layer, in its default order, in a module that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 20, dropout=0.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


class HandWrittenSequenceFirst(nn.Module):
    """Linear maps that hold the sequence first; nothing says so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mix(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


class MoEBlock(nn.Module):
    """A mixture-of-experts block as they are usually written: flatten, choose, select, add."""

    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.shared_expert = nn.Linear(WIDTH, WIDTH)
        self.name = name
        experts = [nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, WIDTH)) for _ in range(2)]
        setattr(self, name, nn.ModuleList(experts))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, WIDTH)
        chosen = self.gate(rows).argmax(-1)
        result = self.shared_expert(rows)
        for number, expert in enumerate(getattr(self, self.name)):
            places = (chosen == number).nonzero()[:, 0]
            result = result.index_add(0, places, expert(rows[places]))
        return result.view_as(hidden)


class Blocks(nn.Module):
    """An embedding and one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([block])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def _swin(name: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    return encoder(f"{name}ForImageClassification", f"{name}Config", **sizes, **options)


def _conditional(length: int) -> Batch:
    return {**tokens(length), "pixel_values": torch.randn(BATCH, 3, 16, 16)}


def _llava() -> nn.Module:
    text, vision = T.LlamaConfig(**_DECODER), T.CLIPVisionConfig(**_VISION)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    return T.LlavaForConditionalGeneration(config)


def _with_image(length: int) -> Batch:
    ids = torch.cat([torch.full((BATCH, 4), 4), torch.randint(5, VOCABULARY, (BATCH, length))], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 16, 16)}


def _clip() -> nn.Module:
    text = {**_ENCODER, "eos_token_id": 2, "bos_token_id": 1}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12))


def _blip2() -> nn.Module:
    config = T.Blip2Config(
        vision_config=T.Blip2VisionConfig(**_VISION),
        qformer_config=T.Blip2QFormerConfig(**_ENCODER, encoder_hidden_size=WIDTH),
        text_config=T.OPTConfig(**_opt()),
        num_query_tokens=4,
        image_token_index=4,
    )
    return T.Blip2ForConditionalGeneration(config)


def _opt() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "ffn_dim": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": WIDTH,
        "pad_token_id": 0,
    }


_WAV = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "layerdrop": 0.0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_DEBERTA = {
    **_ENCODER,
    **_NO_DROPOUT,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 8,
}
_UNKNOWN = "which of its rows belong to which id is not known|may be another than the batch in a module that is unknown"
_SHARED = "is one for all samples, such as relative positions"
_MEDIA = "how many images or clips each sample has is not known"

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": text_encoder("Bert"),
    "BERT, multiple choice": Architecture(
        "text encoder",
        encoder("BertForMultipleChoice", "BertConfig", **_ENCODER),
        lambda length: {"input_ids": torch.randint(5, VOCABULARY, (BATCH, 2, length))},
        exclude="classifier",
    ),
    "RoBERTa": text_encoder("Roberta"),
    "ALBERT": text_encoder("Albert", embedding_size=12),
    "ELECTRA": text_encoder("Electra", embedding_size=12),
    "DistilBERT": Architecture(
        "text encoder",
        encoder(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=WIDTH,
            hidden_dim=20,
            n_layers=1,
            n_heads=2,
        ),
        tokens,
    ),
    "MPNet": text_encoder("MPNet"),
    "ModernBERT": text_encoder(
        "ModernBert", head="Model", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
    ),
    "DeBERTa": Architecture(
        "text encoder", encoder("DebertaForSequenceClassification", "DebertaConfig", **_DEBERTA), tokens
    ),
    "DeBERTa-v3": Architecture(
        "text encoder",
        encoder(
            "DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA, share_att_key=True, position_buckets=4
        ),
        tokens,
    ),
    "Longformer": text_encoder("Longformer", attention_window=4),
    "XLNet": Architecture(
        "text encoder",
        encoder(
            "XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCABULARY, d_model=WIDTH, n_layer=1, n_head=2, d_inner=20
        ),
        tokens,
    ),
    "Funnel": Architecture(
        "text encoder",
        encoder(
            "FunnelModel",
            "FunnelConfig",
            vocab_size=VOCABULARY,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=WIDTH,
            n_head=2,
            d_head=8,
            d_inner=20,
        ),
        tokens,
        lengths=(6,),
    ),
    "GPT-2": Architecture(
        "decoder",
        encoder(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=64
        ),
        tokens,
        ["c_attn", "c_proj", "c_fc"],
        generates=True,
    ),
    "Llama": decoder("Llama"),
    "Gemma 2": decoder("Gemma2", head_dim=8),
    "GPT-NeoX": decoder("GPTNeoX"),
    "Bloom": Architecture(
        "decoder",
        encoder("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=2),
        tokens,
        generates=True,
    ),
    "OPT": Architecture("decoder", encoder("OPTForCausalLM", "OPTConfig", **_opt()), tokens, generates=True),
    "T5": Architecture(
        "encoder-decoder", encoder("T5ForConditionalGeneration", "T5Config", **_T5), both, generates=True
    ),
    "BART": seq2seq("Bart"),
    "Pegasus": seq2seq("Pegasus"),
    "FSMT": seq2seq("FSMT", langs=["a", "b"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
    "LED": seq2seq("LED", attention_window=4),
    "ProphetNet": Architecture(
        "encoder-decoder",
        encoder(
            "ProphetNetForConditionalGeneration",
            "ProphetNetConfig",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            encoder_ffn_dim=20,
            decoder_ffn_dim=20,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            dropout=0.0,
        ),
        both,
        generates=True,
    ),
    "NLLB-MoE": Architecture(
        "mixture of experts",
        encoder(
            "NllbMoeForConditionalGeneration",
            "NllbMoeConfig",
            **_BART,
            num_experts=4,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            expert_capacity=64,
        ),
        both,
        generates=True,
    ),
    "Switch": Architecture(
        "mixture of experts",
        encoder(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            **_T5,
            num_experts=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            expert_capacity=64,
        ),
        both,
        generates=True,
    ),
    "Mixtral": decoder("Mixtral", kind="mixture of experts", num_local_experts=4),
    "Qwen2-MoE": decoder(
        "Qwen2Moe",
        kind="mixture of experts",
        exclude=".*shared_expert_gate",  # one output, less than a scale
        **_MOE,
        shared_expert_intermediate_size=12,
    ),
    "DeepSeek-V3": decoder(
        "DeepseekV3",
        kind="mixture of experts",
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=2,
    ),
    "hand-written experts": Architecture("mixture of experts", lambda: Blocks(MoEBlock()), tokens, lengths=(6, 4)),
    "experts by another name": Architecture(
        "mixture of experts",
        lambda: Blocks(MoEBlock("ffns")),
        tokens,
        ["ffns.0.0", "ffns.1.0"],
        refused=_UNKNOWN,
    ),
    "Mamba": Architecture(
        "state space",
        encoder(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            state_size=4,
            time_step_rank=4,
        ),
        tokens,
        ["in_proj"],  # x_proj is read past the module
        generates=True,
    ),
    "Jamba": decoder(
        "Jamba",
        kind="state space",
        exclude=".*(x_proj|dt_proj|out_proj)",  # read past the module
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "ViT": Architecture("vision", encoder("ViTForImageClassification", "ViTConfig", **_VISION), images(), lengths=(6,)),
    "MLCD": Architecture("vision", encoder("MLCDVisionModel", "MLCDVisionConfig", **_VISION), images(), lengths=(6,)),
    "BEiT": Architecture(
        "vision", encoder("BeitForImageClassification", "BeitConfig", **_VISION), images(), lengths=(6,)
    ),
    "Swin": Architecture("vision", _swin("Swin"), images(32), lengths=(6,)),
    "Swin v2": Architecture("vision", _swin("Swinv2"), images(32), refused=_SHARED, lengths=(6,)),
    "Swin v2, positions excluded": Architecture(
        "vision", _swin("Swinv2"), images(32), exclude=".*continuous_position_bias_mlp.*", lengths=(6,)
    ),
    "MobileViT": Architecture(
        "vision",
        encoder(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            image_size=32,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8],
            num_attention_heads=2,
            mlp_ratio=1.0,
            hidden_dropout_prob=0.0,
            initializer_range=0.2,
        ),
        images(64),
        lengths=(6,),
    ),
    "TimeSformer": Architecture(
        "vision",
        encoder("TimesformerForVideoClassification", "TimesformerConfig", **_VISION, num_frames=3),
        lambda length: {"pixel_values": torch.randn(BATCH, 3, 3, 16, 16)},
        lengths=(6,),
    ),
    "Wav2Vec2": Architecture(
        "audio", encoder("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAV, vocab_size=32), waves, lengths=(6,)
    ),
    "Wav2Vec2-Conformer": Architecture(
        "audio",
        encoder("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **_WAV, vocab_size=32),
        waves,
        refused=_SHARED,
        lengths=(6,),
    ),
    "Whisper": Architecture(
        "audio",
        encoder(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_BART,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=32,
            decoder_start_token_id=2,
            bos_token_id=2,
            eos_token_id=3,
            begin_suppress_tokens=None,
        ),
        lambda length: {
            "input_features": torch.randn(BATCH, 8, 16),
            "decoder_input_ids": torch.randint(5, VOCABULARY, (BATCH, length)),
        },
    ),
    "AST": Architecture(
        "audio",
        encoder(
            "ASTForAudioClassification",
            "ASTConfig",
            **{k: v for k, v in _VISION.items() if k != "image_size"},
            num_mel_bins=16,
            max_length=16,
        ),
        lambda length: {"input_values": torch.randn(BATCH, 16, 16)},
        lengths=(6,),
    ),
    "CLIP": Architecture("multi-modal", _clip, _conditional),
    "BLIP-2": Architecture("multi-modal", _blip2, _with_image),
    "LLaVA": Architecture("multi-modal", _llava, _with_image, refused=_MEDIA),
    "LLaVA, text only": Architecture("multi-modal", _llava, _with_image, exclude=".*(vision_tower|projector).*"),
    "PatchTST": Architecture(
        "time series",
        encoder(
            "PatchTSTModel",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=1,
            ffn_dim=20,
        ),
        lambda length: {"past_values": torch.randn(BATCH, 16, 2)},
        lengths=(6,),
    ),
    "nn.TransformerEncoderLayer": Architecture("PyTorch", SequenceFirst, tokens, ["linear1", "linear2"]),
    "a sequence first that nothing declares": Architecture(
        "PyTorch", HandWrittenSequenceFirst, tokens, refused=_UNKNOWN
    ),
    "a sequence first, declared": Architecture(
        "PyTorch", HandWrittenSequenceFirst, tokens, options={"row_layout": {"mix": "batch_second"}}
    ),
}
