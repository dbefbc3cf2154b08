"""Models that mix text with images, of which a sample may have several: the text right, the images refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ept

from .conftest import awaken

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
IMAGE, PATCHES, IDS = 60, 4, [2, 0, 1]


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> nn.Module:
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=1)
    return transformers.Idefics3ForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 1, "temporal_patch_size": 1,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=61,
        vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def sample(make: Callable[[], nn.Module], images: Tensor, most: int) -> dict[str, Tensor]:
    """A sample with its images ``[n, 3, 8, 8]``, in a batch whose samples have at most ``most``."""
    count = len(images)
    one = [62, *[IMAGE] * PATCHES, 63] if make is qwen2_vl else [IMAGE] * PATCHES
    words = torch.arange(5, 5 + (most - count) * len(one) + 3)
    ids = torch.cat([torch.tensor(one * count), words])[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if make is idefics3:  # an image of zeros is none
        padding = torch.zeros(most - count, *images.shape[1:])
        return {**batch, "pixel_values": torch.cat([images, padding])[None]}
    if make is llava:
        return {**batch, "pixel_values": images}
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(count * PATCHES, -1)
    grid = torch.tensor([[1, 2, 2]] * count)
    return {**batch, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


def adapted(make: Callable[[], nn.Module], exclude: str | None) -> Any:
    torch.manual_seed(0)
    config = ept.EPTConfig(r=2, num_tasks=3, kernel_sizes=(1, 2), target_modules="all-linear", exclude_modules=exclude)
    return awaken(peft.get_peft_model(make(), config)).eval()


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("make", [llava, idefics3, qwen2_vl])
def test_samples_with_several_images(make: Callable[[], nn.Module], counts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    alone = [sample(make, torch.randn(count, 3, 8, 8), max(counts)) for count in counts]
    batch = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
    model = adapted(make, ".*(vision|visual|projector|connector).*")
    with torch.no_grad():
        wanted = torch.cat([model(**one, task_ids=task).logits for one, task in zip(alone, IDS, strict=True)])
        torch.testing.assert_close(model(**batch, task_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(**batch, task_ids=1).logits, wanted, atol=1e-2)
        model = adapted(make, None)
        with pytest.raises(ValueError, match=r"in layer 'model\.vis.*how many images or clips each sample has"):
            model(**batch, task_ids=IDS)
        model(**batch, task_ids=1)
