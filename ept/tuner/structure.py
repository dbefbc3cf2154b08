"""What the classes of a model say about the rows that its layers see, found once, when an adapter is injected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..context import TaskContext, current
from ..mixture import TaskMixture
from ..rows import BATCH_FIRST, BATCH_SECOND, ROWS, Place, RowIndex, RowTracker, places_of


class SampleByFunction:
    """A method of DeBERTa's attention that projects the embeddings of relative positions, run once for each sample.

    All samples share these embeddings, but an adapted projection of them differs from task to task. With one task in
    the batch the method runs as it is.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(
        self, query_layer: Tensor, key_layer: Tensor, relative_pos: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        method = getattr(type(self.module), self.method)
        context = current()
        count = None if context is None or context.uniform or context.shape is not None else context.count
        if context is None or count in (None, 0, 1) or len(query_layer) % count:
            return method(self.module, query_layer, key_layer, relative_pos, *args, **kwargs)
        own = relative_pos is not None and relative_pos.dim() > 2 and len(relative_pos) == count
        parts = []
        for sample, (query, key) in enumerate(zip(query_layer.chunk(count), key_layer.chunk(count), strict=True)):
            with context.serving(slice(sample, sample + 1)):
                positions = relative_pos[sample : sample + 1] if own and relative_pos is not None else relative_pos
                parts.append(method(self.module, query, key, positions, *args, **kwargs))
        return torch.cat(parts)


class SelectedSamples:
    """Whisper's ``generate_with_fallback``, which continues with the recordings that have not ended.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.method)
        context = current()
        count = None if context is None or context.uniform else context.count
        rows, total = kwargs.get("batch_idx_map"), kwargs.get("batch_size")
        if context is None or count in (None, 0, 1) or rows is None or not total or total % count:
            return method(self.module, *args, **kwargs)
        tasks: Any = context.task_ids  # resolved by the generation
        device = tasks.weights.device if isinstance(tasks, TaskMixture) else tasks.device
        with context.serving(torch.tensor(rows, device=device) // (total // count)):
            return method(self.module, *args, **kwargs)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a call's arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class FollowedForward:
    """``forward`` of a block that passes tokens to its parts, under a ``RowTracker`` where tasks are mixed.

    A mixture-of-experts block flattens its input ``[batch, sequence, d]`` and gives every expert some of the tokens.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.

    Args:
        place: how the rows of the block's own input run.
    """

    def __init__(self, block: nn.Module, place: Place) -> None:
        self.block, self.place = block, place
        self.replaced = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current()
        x = first_tensor(args, kwargs)
        places = None if context is None or x is None or torch.compiler.is_compiling() else self._places(x, context)
        if context is None or x is None or places is None:
            return self._forward(*args, **kwargs)
        outer = context.tracker
        with RowTracker(x, places) as context.tracker:
            try:
                return self._forward(*args, **kwargs)
            finally:
                context.tracker = outer

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def _places(self, x: Tensor, context: TaskContext) -> Tensor | None:
        count = context.count
        if count in (None, 0, 1) or context.uniform or x.dim() < 2:
            return None
        if context.tracker is not None and (known := context.tracker.places(x)) is not None:
            return known.view(x.shape[:-1])
        layout = context.layout if context.layout is not None else self.place.layout
        if layout not in (None, BATCH_FIRST, BATCH_SECOND) or (layout is None and self._doubtful(x, context)):
            return None
        return places_of(count, x.shape[:-1], context.shape, second=layout == BATCH_SECOND, device=x.device)

    def _doubtful(self, x: Tensor, context: TaskContext) -> bool:
        """Whether the first dimension of x may be another than the batch."""
        found = None if self.place.known or self.place.doubt is not None else context.shown(x, 0)
        if found is not None:
            return not found[0]
        return self.place.doubt is not None or (not self.place.known and x.dim() > 2 and x.shape[0] == x.shape[1])


class EnterPart:
    """Hooks around a part of a followed block: what its layers see are the rows of its first argument.

    Args:
        selects: whether the part gets tokens that the block has selected; then they are followed to it, or not known.
    """

    def __init__(self, selects: bool) -> None:
        self.selects = selects

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = current()
        if context is None or context.tracker is None:
            return
        context.outer_layouts.append(context.layout)
        x = first_tensor(args, kwargs)
        places = None if x is None else context.tracker.places(x)
        if places is not None or self.selects:
            context.layout = RowIndex(places)


def leave_part(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook that undoes ``EnterPart``."""
    context = current()
    if context is not None and context.tracker is not None and context.outer_layouts:
        context.layout = context.outer_layouts.pop()


#: Layouts inside classes of transformers, by the package of the model: the innermost class that matches counts.
_LAYOUTS: dict[str, dict[str, str]] = {
    "xlnet": {"XLNetLayer": BATCH_SECOND},
    "fsmt": {"(En|De)coderLayer": BATCH_SECOND},
    "longformer": {"LongformerSelfAttention": BATCH_SECOND},
    "led": {"LEDEncoderSelfAttention": BATCH_SECOND},
    "bridgetower": {"BridgeTowerResidualAttention": BATCH_SECOND},
    "bros": {"BrosRelationExtractor|initial_token_classifier": BATCH_SECOND},
    "mask2former": {
        "Mask2FormerAttention": BATCH_FIRST,  # it turns its input round
        "Mask2FormerMaskedAttentionDecoderLayer": BATCH_SECOND,
    },
    "oneformer": {
        "OneFormerAttention": BATCH_FIRST,
        "OneFormerTransformerDecoder(FFN|QueryTransformerDecoder)Layer|OneFormerTextTransformerLayer": BATCH_SECOND,
    },
    "mlcd": {"out_proj": BATCH_SECOND},
    "opt": {"OPTDecoderLayer": ROWS},  # flattens for its feed-forward network
    "timesformer": {"TimesformerLayer": ROWS},  # frames or patches beside the samples
    "mobilevit": {"MobileViTTransformer": ROWS},
    "mobilevitv2": {"MobileViTV2Transformer": ROWS},
    "patchtst": {"PatchTSTEncoderLayer": ROWS},
    "patchtsmixer": {"PatchTSMixerAttention": ROWS},
    "mllama": {"MllamaVision.*": ROWS},  # images and tiles
    **{
        package: {r"\w+TopKGating": ROWS}  # of a mixture-of-experts block
        for package in ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jetmoe")
    },
    # Windows of an image, sample by sample.
    **{
        package: {r"(\w*Swin|Swinv2|Swin2SR|ClapAudio)(Self)?Attention": ROWS}
        for package in ("swin", "swinv2", "swin2sr", "donut", "maskformer", "clap")
    },
    **{
        package: {r"\w*(VisionAttention|VisionSdpaAttention|MultiScaleAttention|VitDetAttention)": ROWS}
        for package in ("sam", "sam_hq", "sam2", "edgetam", "got_ocr2", "vitdet")
    },
}

#: Parts of transformers' models whose rows are not told apart, and why.
_DOUBTS: dict[str, dict[str, str]] = {
    "bros": {"BrosBboxEmbeddings": "it compares every token with every other, and holds the batch third"},
    "omdet_turbo": {"OmDetTurboLanguageBackbone|OmDetTurboTaskEncoder": "the texts of an image are its rows"},
    **{
        package: {r"\w+MemoryAttention\w*": "it holds the frames of a video first"}
        for package in ("sam2_video", "sam3_tracker_video", "edgetam_video")
    },
    "modernbert": {"ModernBertPredictionHead": "with sparse_prediction it sees only tokens that have a label"},
}

_MEDIA = "how many images or clips each sample has is not known here, so that their rows cannot be given to samples"

#: Configs with one of these mix text with other media, by tokens that stand for these.
_MEDIA_TOKENS = (
    *(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")),
    *(f"{kind}_token" for kind in ("image", "audio")),
)

#: Packages of such models where the medium of a sample is always one.
_ONE_A_SAMPLE = {
    "blip_2",
    "instructblip",
    "florence2",
    "kosmos2",
    "git",
    "musicgen",
    "musicgen_melody",
    "csm",
    "mllama",
}

_MEDIA_PARTS = re.compile(
    r"vision|visual|image|img|audio|speech|video|connector|projector|multi_?modal|perceiver|resampler|abstractor|merger"
    r"|aligner|sam_model|clip_model"
)

#: Methods of attention that project what all samples share, such as relative positions: computed sample by sample.
_SHARED_INPUTS = {
    ("deberta", "DisentangledSelfAttention"): "disentangled_att_bias",
    ("deberta_v2", "DisentangledSelfAttention"): "disentangled_attention_bias",
    ("sew_d", "DisentangledSelfAttention"): "disentangled_attention_bias",
}

#: Whisper's method that goes on with some of the samples.
_LONG_FORM = "generate_with_fallback"


def _package(module: nn.Module) -> Iterator[tuple[str, str]]:
    """``(package, class name)`` of transformers' own classes among those of ``module``, the nearest first."""
    for kind in type(module).__mro__:
        parts = kind.__module__.split(".")
        if parts[0] == "transformers":
            yield (parts[2] if len(parts) > 2 and parts[1] == "models" else "", kind.__name__)


def _is_theirs(module: nn.Module) -> bool:
    """Whether ``module`` runs code of transformers, and not that of a class which somebody derived."""
    kind = type(module)
    return any(owner.__module__.split(".")[0] == "transformers" for owner in (kind, kind.forward))


def _ancestors(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """``(name, module)`` of the module at ``path`` and of those that hold it, the innermost first, the model last."""
    names, module, chain = path.split(".") if path else [], model, [("", model)]
    for name in names:
        module = getattr(module, name)
        chain.append((name, module))
    return reversed(chain)


def _look_up(table: dict[str, dict[str, str]], package: str, names: tuple[str, ...]) -> str | None:
    for pattern, value in table.get(package, {}).items():
        if any(re.fullmatch(pattern, name) for name in names):
            return value
    return None


def place_of(model: nn.Module, path: str, declared: str | None = None) -> Place:
    """What is known of the rows that the layer at ``path`` of ``model`` will see.

    Args:
        declared: the layout that the adapter's config gives it, which counts for more.
    """
    if declared is not None:
        return Place(layout=declared)
    layout = doubt = None
    known: bool | None = None
    listed = guessed = False
    for depth, (name, module) in enumerate(_ancestors(model, path)):
        kinds = list(_package(module))
        for package, kind in kinds:
            layout = layout or _look_up(_LAYOUTS, package, (kind, name, path.rpartition(".")[2]))
            doubt = doubt or (None if layout else _look_up(_DOUBTS, package, (kind, name)))
        if layout is None and isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            layout = BATCH_FIRST if module.self_attn.batch_first else BATCH_SECOND
        if layout is None and not kinds:
            layout = _layout_of_neighbours(module)
            guessed = layout is not None
        experts = getattr(module, "experts", None)
        if layout is None and kinds and isinstance(experts, nn.Module) and not _is_list(experts):
            layout = ROWS  # the block flattens its tokens, and its experts are one module for all of them
        if known is None and depth and type(module).__module__.split(".")[0] not in ("torch", "peft"):
            known = _is_theirs(module)  # the code that calls the layer
        listed = listed or (isinstance(module, (nn.ModuleList, nn.ModuleDict)) and bool(path))
    if doubt is None and layout is None and _has_media(model) and _MEDIA_PARTS.search(path):
        doubt = _MEDIA
    return Place(layout, bool(known), listed, doubt, guessed)


def _layout_of_neighbours(module: nn.Module) -> str | None:
    """PyTorch's own attention beside a layer, directly in its module, shows which dimension is the batch there."""
    orders = {part.batch_first for part in module.children() if isinstance(part, nn.MultiheadAttention)}
    return None if len(orders) != 1 else BATCH_FIRST if orders.pop() else BATCH_SECOND


def _has_media(model: Any) -> bool:
    if any(package in _ONE_A_SAMPLE for package, _ in _package(model)):
        return False
    config = getattr(model, "config", None)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    return any(getattr(part, name, None) is not None for part in parts for name in _MEDIA_TOKENS)


def _experts(module: nn.Module) -> list[nn.Module]:
    return [part for name, part in module.named_children() if "expert" in name.lower()]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def follow_rows(model: nn.Module, adapted: type[nn.Module]) -> list[RemovableHandle]:
    """Prepare the parts of ``model`` that select tokens or share inputs, where ``adapted`` layers are in them.

    Mixture-of-experts blocks are followed; attention with relative positions works sample by sample. Once is enough.

    Returns:
        Handles of the hooks; ``unfollow`` takes away the rest.
    """
    handles: list[RemovableHandle] = []
    for path, block in list(model.named_modules()):
        if not any(isinstance(part, adapted) for part in block.modules()):
            continue
        for kind in _package(block):
            method = _SHARED_INPUTS.get(kind)
            if method is not None and method not in block.__dict__:
                object.__setattr__(block, method, SampleByFunction(block, method))
        if hasattr(type(block), _LONG_FORM) and _LONG_FORM not in block.__dict__:
            object.__setattr__(block, _LONG_FORM, SelectedSamples(block, _LONG_FORM))
        lists = [part for part in _experts(block) if _is_list(part)]
        if not lists or is_followed(block):
            continue
        object.__setattr__(block, "forward", FollowedForward(block, place_of(model, path)))
        experts = [part for several in lists for part in several.children()]
        for part in [part for part in block.children() if part not in lists] + experts:
            handles.append(part.register_forward_pre_hook(EnterPart(part in experts), with_kwargs=True))
            handles.append(part.register_forward_hook(leave_part, always_call=True))
    return handles


def is_followed(module: nn.Module) -> bool:
    """Whether ``module`` is a block whose tokens are followed to its parts."""
    return isinstance(module.__dict__.get("forward"), FollowedForward)


def unfollow(model: nn.Module) -> None:
    """Undo what ``follow_rows`` put on modules beside its hooks."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FollowedForward):
            if forward.replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward.replaced
        for name in [
            name for name, value in module.__dict__.items() if isinstance(value, (SampleByFunction, SelectedSamples))
        ]:
            del module.__dict__[name]


def takes_choices(model: nn.Module) -> bool:
    """Whether the model makes one row of every choice of a sample, ``[batch, choices, ...]``."""
    return any(kind.endswith("ForMultipleChoice") for _, kind in _package(model))
