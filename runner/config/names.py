"""The names that a configuration may use, as plain data, so that no floor needs torch for them.

The optimizers are those of torch.optim 2.9; a test compares this table with the installed one.
"""

from __future__ import annotations

from runner.config.chips import SLICES

BACKENDS = ("openxla_step", "openxla", "openxla_eval", "lazy", "eager")
TRAINING_BACKENDS = ("openxla_step", "openxla", "lazy", "eager")
SCHEDULES = ("constant", "linear", "cosine")
PARALLEL = ("single", "data", "fsdp", "fsdp_tensor")
REMAT = ("none", "layers")
MESH_BACKENDS = ("openxla_step", "lazy")
FINDABLE = ("batch_size",)
HARDWARE = ("auto", "cpu", "tpu", *SLICES)
ISOLATIONS = ("warm", "process")
BEST = ("min", "max")

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "ASGD": ("lambd", "alpha", "t0", "weight_decay", "foreach", "maximize"),
    "Adadelta": ("rho", "eps", "weight_decay", "foreach", "maximize"),
    "Adafactor": ("beta2_decay", "eps", "d", "weight_decay", "foreach", "maximize"),
    "Adagrad": (
        "lr_decay",
        "weight_decay",
        "initial_accumulator_value",
        "eps",
        "foreach",
        "maximize",
    ),
    "Adam": (
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "foreach",
        "maximize",
        "decoupled_weight_decay",
    ),
    "AdamW": ("betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach"),
    "Adamax": ("betas", "eps", "weight_decay", "foreach", "maximize"),
    "Muon": (
        "weight_decay",
        "momentum",
        "nesterov",
        "ns_coefficients",
        "eps",
        "ns_steps",
        "adjust_lr_fn",
    ),
    "NAdam": (
        "betas",
        "eps",
        "weight_decay",
        "momentum_decay",
        "decoupled_weight_decay",
        "foreach",
        "maximize",
    ),
    "RAdam": ("betas", "eps", "weight_decay", "decoupled_weight_decay", "foreach", "maximize"),
    "RMSprop": ("alpha", "eps", "weight_decay", "momentum", "centered", "foreach", "maximize"),
    "Rprop": ("etas", "step_sizes", "foreach", "maximize"),
    "SGD": ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach"),
}
"""Class in torch.optim -> its options, without `params` and `lr` and the runner's own."""

NO_MESH = {
    "eager": "it runs on the host",
    "openxla": "its bridge traces anew when results lie otherwise than they did",
    "openxla_eval": "its bridge traces anew when results lie otherwise than they did",
}
"""Backend that runs on one device only -> why."""

REFUSED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times an update, through a closure that no "
    "compiled step has",
    "SparseAdam": "it wants sparse gradients, which XLA does not have",
}
"""Class in torch.optim -> why it cannot train here."""

RUNNER_OPTIONS = {
    "params": "the job's parameter groups are the parameters",
    "lr": "the learning rate is optim.lr",
    "capturable": "the backend decides it",
    "differentiable": "the backend decides it",
    "fused": "it is for CUDA kernels; XLA fuses by itself",
}
"""Arguments of the torch.optim classes that a configuration does not set -> why."""

_FLAGS = (
    "amsgrad",
    "centered",
    "decoupled_weight_decay",
    "foreach",
    "maximize",
    "nesterov",
)
_LISTS = {"betas": 2, "etas": 2, "step_sizes": 2, "ns_coefficients": 3}


def option_example(optimizer: str, option: str) -> bool | int | float | str | list[float]:
    """A value of the type that the option takes."""
    if (optimizer, option) == ("Adafactor", "eps"):
        return [0.0, 0.0]
    if option in _LISTS:
        return [0.0] * _LISTS[option]
    if option in _FLAGS:
        return False
    if option == "adjust_lr_fn":
        return ""
    return 1 if option == "ns_steps" else 0.0
