"""The typed configuration: every key, its type, its unit and its default.

`conf/` holds values for these keys and nothing else. Keys below `model`, `data.options` and
`optim.options` are free for jobs, data sources and optimizers to name: the YAML file that
introduces one fixes its name and type. Rules that span keys are in `runner.config.validate`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Mode(str, enum.Enum):
    """What to do with the job."""

    train = "train"
    evaluate = "evaluate"
    preflight = "preflight"


class Precision(str, enum.Enum):
    """Arithmetic of forward and loss; parameters and optimizer state stay float32."""

    float32 = "float32"
    bf16 = "bf16"


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Which job, and how many examples at a time.

    Attributes:
        name: The job's name; also the name of its output folder.
        entry: `module:Class` of a `jobs.base.Job`.
        about: One line that says what the job trains.
        batch_size: Examples per optimizer update, over all devices and micro-batches.
        eval_batch_size: Examples per evaluation step; the last batch is padded and masked.
    """

    name: str
    entry: str
    about: str = ""
    batch_size: int = 32
    eval_batch_size: int = 100


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    Attributes:
        name: The data's name.
        entry: `module:function` that returns a `jobs.base.Dataset`.
        root: Folder of the user's own data, or null.
        workers: Threads that prepare examples.
        prefetch: Calls whose batches are kept ready on the device.
        options: The source's own settings.
    """

    name: str
    entry: str
    root: str | None = None
    workers: int = 2
    prefetch: int = 2
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PassesConfig:
    """What is done to the traced step before it is compiled (`openxla_step` only).

    Those that round more than float32 does act under `precision=bf16` alone, and round to bf16.

    Attributes:
        attention: Its backward pass by the sum of dO * O; heads that share keys stay together.
        casts: Casts that change nothing are removed.
        cross_entropy: The right class by comparing int32, probabilities computed again.
        embeddings: Rows of embeddings, and so a residual stream, in bf16: gradients err more.
        flash_attention: By a TPU's flash kernels, which round elsewhere; off by default.
        indices: Rows of embeddings are looked up by int32.
        inputs: On TPUs convolutions read a float32 batch as it is, without a copy in bf16.
        multihead: Self-attention of `nn.MultiheadAttention` keeps the batch first.
        norms: Of bf16 inputs: statistics in float32, the output in bf16.
        operands: Of what several products read in bf16, some is computed before them, once.
        parameters: Parameters are added to, or multiply, activations in bf16: gradients err more.
        parts: Gradients of a tensor's parts are stacked, not padded and added.
        roundings: Activations, and sums of what was just made in float32, are rounded once.
        sums: Sums and means of bf16 are taken in float32.
    """

    attention: bool = True
    casts: bool = True
    cross_entropy: bool = True
    embeddings: bool = False
    flash_attention: bool = False
    indices: bool = True
    inputs: bool = True
    multihead: bool = True
    norms: bool = True
    operands: bool = True
    parameters: bool = False
    parts: bool = True
    roundings: bool = True
    sums: bool = True

    @classmethod
    def off(cls) -> PassesConfig:
        """None of them."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """How a training step becomes a program.

    Attributes:
        name: One of the names in `runner.config.names.BACKENDS`.
        steps_per_call: Updates that one program makes, for small models (`openxla_step` only).
        passes: What is done to the traced step before it is compiled.
    """

    name: str
    steps_per_call: int = 1
    passes: PassesConfig = dataclasses.field(default_factory=PassesConfig)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
        name: Name of a class in `torch.optim`.
        lr: Peak learning rate.
        options: Further arguments of the class, such as `momentum`.
    """

    name: str
    lr: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor on `optim.lr`.

    Attributes:
        name: "constant", "linear" or "cosine": the way down after warm-up.
        warmup_fraction: Part of the updates that warms up linearly, in [0, 1).
        final_fraction: Factor at the last update.
    """

    name: str = "constant"
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """What the job runs on.

    Attributes:
        name: "auto" (TPU chips if there are any, else the CPU), "cpu", "tpu" (the chips that are
            here) or a slice in `runner.config.chips`, such as "v5e-8".
        devices: Of each host; null means one on a CPU or with parallel=single, else all chips.
        peak_flops_per_s: Peak FLOP/s of one device for `util/mfu`, in place of what
            `runner.config.chips` says of it.
    """

    name: str = "auto"
    devices: int | None = None
    peak_flops_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a job is spread over its devices.

    Attributes:
        name: "single" uses one device; "data" cuts the batch; "fsdp" cuts the batch, the
            parameters and the optimizer's state; "fsdp_tensor" cuts matrix products as well.
        tensor: Devices along the tensor axis of "fsdp_tensor"; 1 with the others.
    """

    name: str = "single"
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept. The last state of a run is saved in any case.

    Attributes:
        enabled: Whether anything is saved.
        every_s: Seconds between two saves, or null.
        every_steps: Updates between two saves; 0 goes by time alone.
        keep: Checkpoints that are kept, the newest ones.
        keep_every_steps: Checkpoints of multiples of it are kept for ever; 0 keeps none so.
        failures: Saves in a row that may fail (disk full, say) before the run does.
        root: Where checkpoints go instead of the run folder: a folder, or a URL such as
            gs://bucket/folder; each run has a folder of its own in it.
    """

    enabled: bool = True
    every_s: float | None = 600.0
    every_steps: int = 0
    keep: int = 2
    keep_every_steps: int = 0
    failures: int = 3
    root: str | None = None


@dataclasses.dataclass(frozen=True)
class RetriesConfig:
    """How often a run is started again by itself. Each budget is full again after progress.

    Progress is a checkpoint of a later step than any before it.

    Attributes:
        failures: Tries after the job's process raised, was killed or hung.
        preemptions: Tries after a preemption, or null for no limit.
        infrastructure: Tries after faults that are not the job's, such as a busy chip.
        backoff_s: Seconds before the first retry; doubled for each one that follows in a row.
    """

    failures: int = 2
    preemptions: int | None = None
    infrastructure: int = 10
    backoff_s: float = 1.0


@dataclasses.dataclass(frozen=True)
class TimeoutsConfig:
    """How long a run may show no sign of life before it is ended as hung.

    Attributes:
        start_s: Seconds for building the job and loading its state.
        compile_s: Seconds for one compile.
        step_s: Seconds for one step, its wait for data included, and for a batch of evaluation.
        grace_s: Seconds from SIGTERM to the end of the job's process.
        hosts_s: Seconds that a host of a slice waits for the others to start.
    """

    start_s: float = 1800.0
    compile_s: float = 3600.0
    step_s: float = 600.0
    grace_s: float = 25.0
    hosts_s: float = 600.0


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """What `mode=preflight` does besides its verdict.

    Attributes:
        suggest: Whether to compile what may help a job that does not fit.
        find: "batch_size" to search for the largest that fits, or null.
        dump: Whether to leave StableHLO, optimized HLO and the memory report in the run folder.
        cache: Whether a verdict that was reached before is taken as it is.
    """

    suggest: bool = False
    find: str | None = None
    dump: bool = False
    cache: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace for TensorBoard's profile page and for `python -m runner explain`.

    Attributes:
        steps: [first, last] update to trace, or null. Profiled updates are not in the step-time
            figures; the first call of a process compiles and is not traced.
    """

    steps: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class SinksConfig:
    """Where a run's scalars go besides TensorBoard; extra `sinks`. Nothing leaves the run folder.

    Attributes:
        mlflow: Whether to write an MLflow file store, `mlflow/`.
        wandb: Whether to write an offline run of Weights & Biases, `wandb/`.
    """

    mlflow: bool = False
    wandb: bool = False


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How the jobs of a batch (`-m`) share the machine. The same for all of them.

    Attributes:
        name: Name of the batch's folder in `multirun/`; null takes date and time.
        dry_run: Whether to show the plan and stop; `dry_run=true` says it too.
        resume: Whether to go on with the batch that the folder holds; `resume=true` says it too.
        chips_per_job: TPU chips of one job; null takes `hardware.devices`, or one.
        max_concurrent: Jobs at a time; null takes as many as the chips allow, one on the CPU.
        isolation: "warm" hands jobs with the same graph to one process, which compiles it once;
            "process" gives each job a process of its own.
        retries: How often a job that failed is put at the end of the queue again, after its own
            retries.
        time_limit_s: Seconds that one job may take in all, or null.
        fail_fast: Whether the first failure stops the other jobs.
        metric: What decides which job is the best, such as "eval/accuracy"; null takes
            "eval/loss", or "train/loss" where there is none.
        best: "min" or "max": which value of the metric is the best.
    """

    name: str | None = None
    dry_run: bool = False
    resume: bool = False
    chips_per_job: int | None = None
    max_concurrent: int | None = None
    isolation: str = "warm"
    retries: int = 0
    time_limit_s: float | None = None
    fail_fast: bool = False
    metric: str | None = None
    best: str = "min"


@dataclasses.dataclass(frozen=True)
class RayConfig:
    """The cluster that a batch with hydra/launcher=ray runs on. The same for all of its jobs.

    Attributes:
        address: HOST:PORT of a cluster that runs, or auto for one on this machine; null starts
            one here, which ends with the batch.
        cpus_per_job: Processor cores that a job asks for where it asks for no TPU chips.
    """

    address: str | None = None
    cpus_per_job: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        mode: "train", "evaluate" to pass once over the held-out data, or "preflight" to hear
            what the TPU compiler says of the training step, without a TPU.
        steps: Optimizer updates.
        seed: Fixes initial weights, data order, augmentation and dropout.
        precision: "float32" or "bf16" (autocast).
        grad_clip_norm: Largest global gradient norm, or null.
        accumulate_steps: Micro-batches that one update is split into; the examples are dealt out
            to them one by one, so that each takes of every device's share.
        remat: "none", or "layers" to keep of each layer its input alone and compute it again in
            the backward pass (`openxla_step` only): less memory for about a third more work.
        scan_layers: Whether layers that repeat are a loop in the program instead of one after the
            other (needs remat=layers): tracing and compiling take as long for any number of them.
        log_every: Updates between two points in TensorBoard and metrics.jsonl.
        eval_every: Updates between two evaluations; 0 evaluates only at the end.
        strict: Whether a recompile after warm-up is an error.
        resume: What a run starts from: "auto" goes on from its own folder's checkpoints, "never"
            refuses a folder that has any, a path (run folder, checkpoint or URL) goes on from
            there in a new folder.
        init_from: A path as for `resume`, of which only weights and buffers are taken.
        model: The job's own settings.
        sinks: Where scalars go besides TensorBoard.
        batch: How the jobs of a batch share the machine.
        ray: The cluster that they run on instead, with hydra/launcher=ray.
    """

    job: JobConfig
    data: DataConfig
    backend: BackendConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    hardware: HardwareConfig
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    preflight: PreflightConfig = dataclasses.field(default_factory=PreflightConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    mode: Mode = Mode.train
    steps: int = 100
    seed: int = 0
    precision: Precision = Precision.float32
    grad_clip_norm: float | None = None
    accumulate_steps: int = 1
    remat: str = "none"
    scan_layers: bool = False
    log_every: int = 1
    eval_every: int = 0
    strict: bool = False
    resume: str = "auto"
    init_from: str | None = None
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    retries: RetriesConfig = dataclasses.field(default_factory=RetriesConfig)
    timeouts: TimeoutsConfig = dataclasses.field(default_factory=TimeoutsConfig)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    sinks: SinksConfig = dataclasses.field(default_factory=SinksConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
