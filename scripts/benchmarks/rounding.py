"""How far a bf16 step's gradients are from float64: with passes off, on, and with one switched.

Small models of the kinds that `scripts/bench tpu_program` compiles, on XLA's CPU device. Given is
the distance of all gradients from those of the same weights and batch in float64, relative to
their norm, over several random problems: its root mean square with passes off, and for the rest
the ratio to that, with the standard error of the mean by problem.

Everything is rounded where the program says so. By default XLA's CPU compiler does not round what a
bf16 operation gives before a float32 one reads it, though it does where a cast says so; in the TPU
compiler's programs such tensors lie in memory in bf16. `--excess` leaves the compiler its default.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence

os.environ["PJRT_DEVICE"] = "CPU"

import torch
import torchvision
from contest.choices import positive, some
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.gpt import GPT, Shape
from runner.backends.base import Recipe
from runner.backends.registry import build
from runner.config.schema import PassesConfig
from runner.xla.device import open_device

Batch = dict[str, Tensor]

VARIANTS = {
    "off": PassesConfig.off(),
    "on": PassesConfig(),
    "embeddings=true": PassesConfig(embeddings=True),
    "parameters=true": PassesConfig(parameters=True),
    "roundings=false": PassesConfig(roundings=False),
    "norms=false": PassesConfig(norms=False),
}
MODELS = ("gpt", "vit", "resnet18")


def main() -> int:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench rounding", description=__doc__)
    parser.add_argument(
        "--seeds", type=positive, default=8, help="problems of each model (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print each problem's errors as JSON")
    for option, choices in (("models", MODELS), ("variants", tuple(VARIANTS))):
        parser.add_argument(
            f"--{option}", type=some(choices), default=list(choices), help=", ".join(choices)
        )
    parser.add_argument(
        "--excess", action="store_true", help="let XLA's CPU compiler leave out roundings"
    )
    asked = parser.parse_args()
    if not asked.excess:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_allow_excess_precision=false".strip()
    variants = ["off", *(name for name in asked.variants if name != "off")]
    open_device()
    rows = {}
    if not asked.json:
        print(
            _line(["model", *variants]), _line(["---"] * (1 + len(variants))), sep="\n", flush=True
        )
    for model in asked.models:
        rows[model] = _errors(model, asked.seeds, variants)
        if not asked.json:
            print(_row(model, rows[model]), flush=True)
    if asked.json:
        print(json.dumps(rows, indent=2))
    return 0


def _errors(model: str, seeds: int, variants: Sequence[str]) -> dict[str, list[float]]:
    """A model's error by variant, in each problem."""
    errors: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(seeds):
        expected = _exact(*_problem(model, seed))
        whole = _norm(expected)
        for name in variants:
            found = _gradients(*_problem(model, seed), VARIANTS[name])
            distance = _norm({key: found[key] - one for key, one in expected.items()})
            errors[name].append(distance / whole)
        print(f"{model}, problem {seed + 1} of {seeds}", file=sys.stderr, flush=True)
    return errors


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.hypot(*(one.double().norm().item() for one in tensors.values()))


def _problem(model: str, seed: int) -> tuple[nn.Module, Batch]:
    """A model with random weights and a random batch."""
    torch.manual_seed(seed)
    if model == "gpt":
        text = torch.randint(256, (4, 65))
        batch = {"input": text[:, :-1].contiguous(), "target": text[:, 1:].contiguous()}
        return GPT(Shape(256, 64, 4, 128, 4, 0.0, "learned")), batch
    if model == "vit":
        made = torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 256, num_classes=10)
        nn.init.normal_(made.heads[0].weight, std=0.1)  # it begins at 0, and gradients with it
        return made, _images(16, 32)
    return torchvision.models.resnet18(num_classes=10), _images(32, 64)


def _images(count: int, size: int) -> Batch:
    return {"input": torch.randn(count, 3, size, size), "target": torch.randint(10, (count,))}


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(batch["input"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), batch["target"].flatten())


def _no_metrics(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raise NotImplementedError


def _exact(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradients in float64, by plain PyTorch."""
    model = copy.deepcopy(model).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    named = dict(model.named_parameters())
    found = torch.autograd.grad(_loss(model, wide), list(named.values()))
    return dict(zip(named, found, strict=True))


def _gradients(model: nn.Module, batch: Batch, passes: PassesConfig) -> dict[str, Tensor]:
    """What one update by plain SGD with a rate of 1 takes away."""
    recipe = Recipe(model, _loss, _no_metrics, _sgd, autocast=torch.bfloat16, passes=passes)
    backend = build(
        "openxla_step", recipe, on_start=lambda _: None, on_record=lambda _: None, strict=False
    )
    before = {name: value.clone() for name, value in backend.state(0).params.items()}
    backend.train_step(backend.place(batch), step=0, lr=1.0)
    after = backend.state(1).params
    return {name: value.double() - after[name].double() for name, value in before.items()}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def _row(model: str, errors: Mapping[str, Sequence[float]]) -> str:
    without = errors["off"]
    others = (_ratio(found, without) for name, found in errors.items() if name != "off")
    return _line([model, f"{_mean(without):.4f}", *others])


def _ratio(found: Sequence[float], without: Sequence[float]) -> str:
    """The errors' ratio, and its standard error from the problems' own ratios."""
    ratio = _mean(found) / _mean(without)
    if len(found) == 1:
        return f"{ratio:.3f}"
    logs = [math.log(one / other) for one, other in zip(found, without, strict=True)]
    return f"{ratio:.3f} ± {ratio * statistics.stdev(logs) / math.sqrt(len(logs)):.3f}"


def _mean(errors: Sequence[float]) -> float:
    """The root mean square."""
    return math.hypot(*errors) / math.sqrt(len(errors))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
