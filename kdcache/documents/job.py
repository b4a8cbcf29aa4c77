"""The job document: one TOML file that names the transfer set, the teachers, the cache and the students."""

from __future__ import annotations

__all__ = [
    "BuildOptions",
    "CacheOptions",
    "DaskCluster",
    "DaskJobqueue",
    "DaskLocal",
    "ExecutorSpec",
    "Factory",
    "InProcess",
    "Job",
    "Optimizer",
    "StudentSweep",
    "TeacherSource",
]

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Document, ImportString, Name, Temperature
from kdcache.documents.codec_specs import CodecSpec

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, le=1)]


class Factory(Document):
    """A Python callable, by import string, and its keyword arguments."""

    title: ClassVar[str] = "factory"

    factory: ImportString
    """The callable."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


class TeacherSource(Factory):
    """A teacher: a factory that gives a torch module, and the checkpoint with its weights."""

    title: ClassVar[str] = "teacher source"

    name: Name
    """The teacher's name in the cache."""
    checkpoint: str | None = None
    """A .safetensors file (preferred) or a torch file read with weights_only; relative to the job file."""


class InProcess(Document):
    """Run all tasks in this process."""

    title: ClassVar[str] = "executor"

    kind: Literal["in-process"] = "in-process"


class DaskLocal(Document):
    """Start a Dask LocalCluster of processes on this machine."""

    title: ClassVar[str] = "executor"

    kind: Literal["dask-local"] = "dask-local"
    num_workers: Positive = 2
    """Worker processes."""
    threads_per_worker: Positive = 1
    """Torch threads of a worker."""


class DaskCluster(Document):
    """Use a running Dask cluster."""

    title: ClassVar[str] = "executor"

    kind: Literal["dask"] = "dask"
    address: Annotated[str, Field(min_length=1)]
    """The scheduler's address, such as tcp://host:8786."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Dask resources a task takes, such as {"GPU" = 1}: one accelerator a worker."""


class DaskJobqueue(Document):
    """Ask a batch system (Slurm, PBS, ...) for workers through dask-jobqueue."""

    title: ClassVar[str] = "executor"

    kind: Literal["dask-jobqueue"] = "dask-jobqueue"
    cluster: Annotated[str, Field(pattern=r"^[A-Za-z]+Cluster$")] = "SLURMCluster"
    """The dask_jobqueue class."""
    num_jobs: Positive = 1
    """Jobs to ask for."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the cluster class: queue, cores, memory, walltime, ..."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Dask resources a task takes, as of `dask`."""


ExecutorSpec = Annotated[InProcess | DaskLocal | DaskCluster | DaskJobqueue, Field(discriminator="kind")]


class CacheOptions(Document):
    """Where the cache stands and how it is coded."""

    title: ClassVar[str] = "cache options"

    address: Annotated[str, Field(min_length=1)]
    """A folder, relative to the job file, or an address such as s3://bucket/prefix."""
    num_classes: Positive | None = None
    """Classes of every teacher; found by running the first teacher on one example where absent."""
    codec: CodecSpec | None = None
    """How logits are stored; see below. `codes` where nothing is said of codec, max_kl or bytes_per_row."""
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """In place of a codec: the smallest cache whose mean KL, in nats, is at most this at temperatures 1, 2 and 4. Above
    0 and at most 1."""
    bytes_per_row: Annotated[float, Field(gt=0)] | None = None
    """In place of a codec: the most faithful cache of at most so many bytes a row and teacher, codes and parameters;
    ids and documents come on top."""
    merge: Literal["geometric"] | None = None
    """`geometric` stores the mean of the members' logits alone."""
    shard_rows: Positive | None = None
    """Rows of a stored object; chosen from the row's size where absent."""
    chunk_rows: Positive | None = None
    """Rows that are read and checked together; chosen where absent."""
    num_pilot_rows: Positive | None = None
    """Rows on which the codec is fitted and size and time are forecast; 2,048 to 4,096 where absent."""

    @model_validator(mode="after")
    def _check(self) -> CacheOptions:
        given = [name for name in ("codec", "max_kl", "bytes_per_row") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        return self


class BuildOptions(Document):
    """How teachers are run."""

    title: ClassVar[str] = "build options"

    batch_size: Positive | None = None
    """Examples a teacher sees at once; 256 where absent. Part of the plan."""
    device: str = "auto"
    """`auto` takes cuda where there is one."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Reduced precision of the teachers' forward pass; full where absent."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load examples."""
    executor: ExecutorSpec = InProcess()
    """Where tasks run; see below."""


class Optimizer(Document):
    """How students are optimised."""

    title: ClassVar[str] = "optimizer"

    kind: Literal["sgd", "adam", "adamw"] = "adam"
    """The algorithm."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """At the start."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd alone (Nesterov)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """As the algorithm takes it."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 over the run."""


class StudentSweep(Factory):
    """Students of one architecture, one for each (temperature, soft weight, seed), trained side by side."""

    title: ClassVar[str] = "student sweep"

    name: Name
    """Names the sweep's folder of results."""
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (4.0,)
    """Of the soft targets: a student for each."""
    soft_weights: Annotated[tuple[Weight, ...], Field(min_length=1)] = (0.9,)
    """Weight of the soft term; 0 trains on hard labels alone."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Of the initial weights: a student for each."""
    mean: Literal["geometric", "arithmetic", "tempered-arithmetic"] = "geometric"
    """Which mean over the teachers."""
    divergence: Literal["forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"] = "forward-kl"
    """What the soft term measures."""
    subset: Factory | None = None
    """Gives the example_ids to train on; all where absent."""
    epochs: Positive = 20
    """Passes over the examples."""
    batch_size: Positive = 128
    """Examples a step."""
    optimizer: Optimizer = Optimizer()
    """How students are optimised; see below."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Reduced precision of the students' forward pass in training; weights and losses stay in float32."""
    evaluation_epochs: Positive = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    bias_correction: bool = False
    """After training, match each class's mean softmax mass on the transfer set's inputs to its label frequency."""

    @model_validator(mode="after")
    def _check(self) -> StudentSweep:
        for field in ("temperatures", "soft_weights", "seeds"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} holds a value more than once")
        return self


class Job(Document):
    """A whole job file."""

    title: ClassVar[str] = "job"

    format_version: Literal[1] = 1
    """Version of the job file's schema."""
    name: Name
    """Names the job."""
    cache: CacheOptions
    """Where the cache stands and how it is coded."""
    transfer_set: Factory
    """Gives a kdcache.TransferSet."""
    teachers: tuple[TeacherSource, ...] = ()
    """The ensemble, in order."""
    build: BuildOptions = BuildOptions()
    """How teachers are run."""
    evaluation: Factory | None = None
    """Gives (inputs, labels) on which students are tested."""
    students: tuple[StudentSweep, ...] = ()
    """What `kdcache train` trains."""

    @model_validator(mode="after")
    def _check(self) -> Job:
        for field in ("teachers", "students"):
            names = [item.name for item in getattr(self, field)]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{field}: names stand more than once: {', '.join(repeated)}")
        return self
