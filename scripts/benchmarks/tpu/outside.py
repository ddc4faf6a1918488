"""Models of other people's libraries for `scripts/bench tpu_program`, random and without data.

Nothing here was written with the passes in mind, and no pass knows of them. There is no JAX twin:
the question is what the passes bring, and that they never cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torchvision.models as vision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tpu.models import Batch, Model, adamw, described

TOKENS = 512


def _convnext(layers: int) -> nn.Module:
    stages = ((96, 192), (192, 384), (384, 768), (768, None))
    config = vision.convnext.CNBlockConfig
    return vision.ConvNeXt([config(width, after, layers) for width, after in stages])


def _densenet(layers: int) -> nn.Module:
    return vision.DenseNet(32, (layers,) * 4)


def _swin(layers: int) -> nn.Module:
    return vision.SwinTransformer([4, 4], 96, [layers] * 4, [3, 6, 12, 24], [7, 7])


def _gpt2(layers: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))


def _llama(layers: int) -> nn.Module:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(num_hidden_layers=layers, num_attention_heads=16, **sizes)
    return transformers.LlamaForCausalLM(config)


def _vit(layers: int) -> nn.Module:
    config = transformers.ViTConfig(num_hidden_layers=layers, num_labels=1000)
    return transformers.ViTForImageClassification(config)


def _images() -> dict[str, Tensor]:
    return {"image": described(64, 3, 224, 224), "label": described(64, whole=True)}


def _text() -> dict[str, Tensor]:
    return {"tokens": described(8, TOKENS, whole=True), "target": described(8, TOKENS, whole=True)}


def _classes(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["image"]).logits, batch["label"])


def _next(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["tokens"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())


def _seen(
    build: Callable[[int], nn.Module], loss: Callable[[nn.Module, Batch], Tensor] = _classes
) -> Model:
    return Model(build, _images, loss, adamw)


def _read(build: Callable[[int], nn.Module]) -> Model:
    return Model(build, _text, _next, adamw)


OUTSIDE = {
    "torchvision_convnext": _seen(_convnext),
    "torchvision_densenet": _seen(_densenet),
    "torchvision_swin": _seen(_swin),
    "transformers_gpt2": _read(_gpt2),
    "transformers_llama": _read(_llama),
    "transformers_vit": _seen(_vit, _logits),
}
