"""What a recipe may say: one frozen section a part of a run; unknown keys, NaN and infinity are refused.

Names carry their units. A section is read by the part it configures and by nobody else.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_inherit.config.grow import GrowSection
from megatron_inherit.config.section import (
    Count,
    Logger,
    Positive,
    Rate,
    Real,
    Section,
    Share,
    Text,
    listed,
    no_bool,
)
from megatron_inherit.config.sharing import DistillSection, SharingSection
from megatron_inherit.config.tasks import TasksSection


class RunSection(Section):
    """Which run this is.

    Attributes:
        name: What plots and loggers call it.
        output: The run's folder; on several nodes one that all of them see.
        seed: Of fresh weights and, unless ``data.seed`` is given, of the sample order.
    """

    name: Text = "run"
    output: Text
    seed: Count = 1234


class ModelSection(Section):
    """Where the model comes from: a folder, or a preset for random weights.

    Attributes:
        path: Folder of any checkpoint format.
        preset: Name of ``arch.presets``, instead of ``path``.
        shape: Fields of ModelConfig that replace the preset's.
        init: ``weights`` takes the folder's, ``random`` draws new ones in its shape.
        residual: False trains the blocks without residual connections, an ablation that can only be trained and
            scored here: nothing exports it.
    """

    path: Text | None = None
    preset: Text | None = None
    shape: dict[str, int | float | bool] = Field(default_factory=dict)
    init: Literal["weights", "random"] = "weights"
    residual: bool = True


class DataSection(Section):
    """What the model is trained on.

    Attributes:
        path: Folder of a subset or of tokens, or prefix of a Megatron ``.bin/.idx`` pair.
        split: ``train``, ``valid`` or ``test`` of a subset; ``all`` for tokens that have no splits.
        epochs: Passes over the data, each in an order of its own; a run that needs more is refused, but for what
            the last step of a token budget lacks. 0: no limit.
        seed: Of the sample order; default ``run.seed``.
        shuffle: False gives the samples in stored order.
        boundary: Documents in one sample see each other (``packed``), are kept apart by attention and positions
            (``reset``), or never share one (``none``).
        verify: ``quick`` compares sizes and times, ``full`` hashes all files first.
    """

    path: Text
    split: Literal["train", "valid", "test", "all"] = "train"
    epochs: Count = 1
    seed: Count | None = None
    shuffle: bool = True
    boundary: Literal["packed", "reset", "none"] = "packed"
    verify: Literal["quick", "full"] = "quick"


class BatchRamp(Section):
    """A global batch that grows.

    Attributes:
        start: Sequences of the first steps.
        increment: Sequences by which it grows.
        samples: Sequences over which it reaches ``train.global_batch``.
    """

    start: Positive
    increment: Positive
    samples: Positive


class TrainSection(Section):
    """How much is trained, and in what pieces.

    Attributes:
        steps: Optimizer steps, instead of ``budget``; 0 scores the model it starts from and no more.
        budget: Tokens to see, instead of ``steps``; ``50B`` for instance, repetitions included.
        global_batch: Sequences of a step, over all replicas.
        micro_batch: Sequences of one forward pass on one replica.
        sequence_length: Tokens of a sequence.
        batch_ramp: A growing global batch, or none.
        dtype: Of weights and activations; ``bf16`` keeps fp32 masters.
        recompute: Activations computed anew in the backward pass: of no block, of the MLPs, of whole blocks.
        deterministic: The same bits in every run, at some cost on a GPU.
        stop_after: Steps of one session after which it saves and ends with code 75, for quotas and tests.
    """

    steps: Count | None = None
    budget: Positive | None = None
    global_batch: Positive
    micro_batch: Positive = 1
    sequence_length: Positive
    batch_ramp: BatchRamp | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    deterministic: bool = False
    stop_after: Positive | None = None


class OptimizerSection(Section):
    """AdamW; norms, biases and embeddings are not decayed.

    Attributes:
        lr: Peak learning rate.
        beta1, beta2, eps, weight_decay: Of AdamW.
        clip: Largest L2 norm of the whole gradient; 0 leaves it as it is.
    """

    lr: Rate = 3e-4
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Rate = 1e-8
    weight_decay: Real = 0.1
    clip: Real = 1.0


class ScheduleSection(Section):
    """The learning rate over the steps.

    Attributes:
        kind: ``cosine``, ``linear`` and ``inverse-sqrt`` fall to the floor, ``wsd`` is constant but for its end.
        warmup_steps: Steps of the linear rise from 0.
        floor_lr: Learning rate at the end.
        decay_steps: ``cosine`` and ``linear``: step at which the floor is reached, default the last one; ``wsd``:
            number of last steps in which it falls, default a tenth.
        decay_shape: Of the fall of ``wsd``.
    """

    kind: Literal["cosine", "linear", "constant", "inverse-sqrt", "wsd"] = "cosine"
    warmup_steps: Count = 0
    floor_lr: Real = 0.0
    decay_steps: Positive | None = None
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"


class ParallelSection(Section):
    """How the model is spread; what is left of the processes are replicas.

    Attributes:
        tp, pp, vpp, cp: Tensor, pipeline, virtual pipeline (chunks a stage) and context parallel sizes.
        sequence_parallel: Splits activations between the tensor parallel regions along the sequence too.
        first_stage_layers, last_stage_layers: Blocks of these pipeline stages where they are to differ.
        timeout_seconds: After which a collective that hangs raises.
    """

    tp: Positive = 1
    pp: Positive = 1
    vpp: Positive = 1
    cp: Positive = 1
    sequence_parallel: bool = False
    first_stage_layers: Positive | None = None
    last_stage_layers: Positive | None = None
    timeout_seconds: Rate = 600.0


class AioSection(Section):
    """How DeepSpeed reads and writes ``deepspeed.nvme_path``.

    Attributes:
        block_size: Bytes of one request.
        queue_depth: Requests at a time.
        intra_op_parallelism: Threads of a rank.
        single_submit: Requests are handed over one by one.
        overlap_events: Handing over and waiting overlap.
    """

    block_size: Positive = 1 << 20
    queue_depth: Positive = 8
    intra_op_parallelism: Positive = 1
    single_submit: bool = False
    overlap_events: bool = True


class DeepSpeedSection(Section):
    """Read with ``engine: deepspeed`` only.

    Attributes:
        zero_stage: What is sharded over the replicas: 1 optimizer, 2 and gradients, 3 and weights.
        offload: What is kept in host memory.
        nvme_path: Folder of a local disk, on every node, for the optimizer state, which then is not in host memory.
        aio: How that disk is used.
    """

    zero_stage: Annotated[int, BeforeValidator(no_bool), Field(ge=0, le=3)] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    nvme_path: Text | None = None
    aio: AioSection = AioSection()


class MegatronSection(Section):
    """Read with ``engine: megatron``, but for ``overlap_grad_reduce``, which is DeepSpeed's ``overlap_comm`` too.

    Attributes:
        distributed_optimizer: Shards masters and moments over the replicas.
        overlap_grad_reduce: Reduces gradients while the backward pass goes on.
        overlap_param_gather: Gathers the weights of the next step while its forward pass goes on.
    """

    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class CheckpointSection(Section):
    """When the state is saved and what is kept.

    Attributes:
        every_steps: Steps between saves; one that falls on a spike waits for its end, the last step is always saved.
        keep_last: Newest checkpoints that are kept.
        keep_every_steps: Checkpoints at multiples of this, or the next one after, are kept for ever.
        asynchronous: Only the copy to host memory blocks, and a thread writes; costs each rank as much host memory as
            its share of a checkpoint.
        on_disk_full: Whether training stops (exit code 7) or goes on without that checkpoint.
    """

    every_steps: Positive = 1000
    keep_last: Positive = 3
    keep_every_steps: Positive | None = None
    asynchronous: bool = True
    on_disk_full: Literal["stop", "continue"] = "stop"


class EvalSection(Section):
    """The fixed windows on which every run is measured.

    Attributes:
        windows: File of evaluation windows, or None for no evaluation.
        every_steps: Steps between evaluations; the start and the last step are always evaluated.
        micro_batch: Windows a replica takes at a time; default eight times ``train.micro_batch``.
        tasks: lm-eval tasks to score on the way, or none.
    """

    windows: Text | None = None
    every_steps: Positive = 1000
    micro_batch: Positive | None = None
    tasks: TasksSection | None = None


class LoggingSection(Section):
    """What is told, and to whom; metrics.jsonl is always written.

    Attributes:
        every_steps: Steps between lines on the terminal and to the loggers.
        loggers: Further receivers of the metrics.
        project: What wandb, trackio and mlflow file the run under.
        flops_formula: Of the model FLOPs utilisation: ``palm`` 6N + 12Lhs, ``causal`` with half the attention.
        peak_tflops: Dense peak of one device; default the data sheet's for a known GPU.
        profile_steps: Steps that ``--profile`` traces, after ten others.
    """

    every_steps: Positive = 10
    loggers: Annotated[tuple[Logger, ...], BeforeValidator(listed)] = ()
    project: Text = "megatron_inherit"
    flops_formula: Literal["palm", "causal"] = "palm"
    peak_tflops: Rate | None = None
    profile_steps: Positive = 3


class GuardSection(Section):
    """What watches over the run.

    Attributes:
        watchdog_seconds: Without progress for so long the silent rank is named and the run ends.
        weight_hash_every_steps: Steps between comparisons of the replicas' weights.
        straggler_every_steps: Steps between looks at the ranks' speed.
        straggler_score: A rank is reported if a step would take less than this share, were it as fast as the fastest.
        spike_window: Losses from which a spike is told.
        spike_sigma: Standard deviations above their mean that make a loss a spike.
        spike_patience: Spikes or non-finite gradients in a row that roll the run back to its last checkpoint.
        max_rollbacks: Rollbacks after which the run gives up with exit code 6.
    """

    watchdog_seconds: Rate = 1800.0
    weight_hash_every_steps: Positive = 1000
    straggler_every_steps: Positive = 20
    straggler_score: Share = 0.7
    spike_window: Annotated[int, BeforeValidator(no_bool), Field(ge=8, le=100_000)] = 128
    spike_sigma: Rate = 6.0
    spike_patience: Positive = 4
    max_rollbacks: Count = 2


class RunConfig(Section):
    """A complete run; ``engine`` chooses which of the two engines' sections counts."""

    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    engine: Literal["deepspeed", "megatron"] = "megatron"
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    megatron: MegatronSection = MegatronSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    logging: LoggingSection = LoggingSection()
    guard: GuardSection = GuardSection()
    sharing: SharingSection = SharingSection()
    distill: DistillSection = DistillSection()
    grow: GrowSection = GrowSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        from megatron_inherit.config.checks import CHECKS

        for check in CHECKS:
            check(self)
        return self
