"""Every setting of a training run, as read from `--config FILE`. What a paper gives is named; the rest is ours."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Literal

from train_adv.attacks.norms import NormName, check_epsilon
from train_adv.averaging import AveragingKind
from train_adv.data.folder import CorruptPolicy
from train_adv.hosts.make import HostName
from train_adv.modes import NaturalStatistics
from train_adv.topology.kernels import KernelName
from train_adv.topology.loss import Direction, Reduction
from train_adv.topology.regularizer import ReferenceKind, TopologyInputs


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
        name: digits, cifar10, cifar100, svhn, tiny-imagenet, a folder, or FILE.npz#train_x,train_y,test_x,test_y.
        dir: looked in first, before EXPKIT_DATA and the user's cache.
        limit: only the first so many training images (0: all), for trials.
        image_size, corrupt, resident_gib: of image folders, see `train_adv.data.folder`.
        padding, flip: augmentation; left out: what is customary for the data.
        erase: share of images of which a random rectangle is blackened.
        workers: processes that decode images that are not held in memory.
    """

    name: str = "digits"
    dir: Path | None = None
    limit: int = 0
    image_size: int = 224
    corrupt: CorruptPolicy = "refuse"
    resident_gib: float = 4.0
    padding: int | None = None
    flip: bool | None = None
    erase: float = 0.0
    workers: int = 4

    def __post_init__(self) -> None:
        numbers = {"limit": self.limit, "resident_gib": self.resident_gib, "workers": self.workers}
        for name, value in {**numbers, "padding": self.padding or 0}.items():
            _require(value >= 0, f"data.{name} is {value}; it must be 0 or more")
        _require(0 <= self.erase <= 1, f"data.erase is {self.erase}; it must be a share of images, 0 to 1")
        _require(self.image_size >= 1, f"data.image_size is {self.image_size}; it must be 1 or more")


@dataclass(frozen=True)
class AttackConfig:
    """The training attack, and the validation attack's radius.

    Attributes:
        norm: Linf, L2 or L1.
        epsilon: radius for images in [0, 1]; left out, for Linf alone: 8/255 (digits: 0.2).
        step_size: left out: a quarter of epsilon (2/255 for 8/255).
        steps: gradient steps.
    """

    norm: NormName = "Linf"
    epsilon: float | None = None
    step_size: float | None = None
    steps: int = 10

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            check_epsilon(self.epsilon, self.norm)
        _require(self.epsilon is not None or self.norm == "Linf", f"attack.epsilon is needed with norm {self.norm}")
        if self.step_size is not None:
            _require(0 <= self.step_size < inf, f"attack.step_size is {self.step_size}; it must be 0 or more")
        _require(self.steps >= 1, f"attack.steps is {self.steps}; it must be 1 or more")


@dataclass(frozen=True)
class TopologyConfig:
    """TRAIN. It is on where weight or ratio is above 0.

    Attributes:
        weight: lambda; see RESULTS.md for what was measured, there is no natural scale.
        ratio: instead of a weight, the ratio of gradient norms (topology to host) to which lambda is set at the
            start of every epoch.
        inputs: whose features keep the topology of the natural images: the network's of the "natural" images, as in
            the paper, of the "adversarial" ones, or the mean loss of "both" (ours).
        control: the natural forward at lambda 0, a fair control for hosts that have none.
        metrics: measure the topology on the validation split after every epoch (needs a reference, not a weight).
        reference: "frozen", "co-trained" or "ema".
        path: checkpoint or run folder of the standard model; left out, one is trained first, into the run's folder.
        reference_epochs: epochs of that training; 0 is as many as the run's.
        warmup: epochs over which lambda rises from 0.
        decay: of an "ema" reference.
        statistics: BatchNorm in the natural forward that a host does not have: "shared", "dual" or "frozen".
        kernel ... reduction: see `TopologyLoss`.
    """

    weight: float = 0.0
    ratio: float = 0.0
    inputs: TopologyInputs = "natural"
    control: bool = False
    metrics: bool = False
    reference: ReferenceKind = "frozen"
    path: Path | None = None
    reference_epochs: int = 0
    warmup: float = 0.0
    decay: float = 0.999
    statistics: NaturalStatistics = "shared"
    kernel: KernelName = "cosine"
    temperature: float = 0.1
    perplexity: float = 30.0
    diagonal: bool = False
    direction: Direction = "forward"
    neighbours: int = 0
    reduction: Reduction = "row"

    def __post_init__(self) -> None:
        for name in ("weight", "ratio", "warmup", "reference_epochs", "neighbours"):
            value = getattr(self, name)
            _require(0 <= value < inf, f"topology.{name} is {value}; it must be 0 or more")
        _require(0 < self.temperature < inf, f"topology.temperature is {self.temperature}; it must be above 0")
        _require(1 <= self.perplexity < inf, f"topology.perplexity is {self.perplexity}; it must be 1 or more")
        _require(0 <= self.decay <= 1, f"topology.decay is {self.decay}; it must be in [0, 1]")
        _require(not (self.metrics and self.reference == "ema"), "topology.metrics need a standard model; ema has none")
        _require(not (self.weight and self.ratio), "give topology.weight or topology.ratio, not both")
        started = "an ema starts as the network itself, with no distance to measure"
        _require(not (self.ratio and self.reference == "ema"), f"topology.ratio needs a standard model; {started}")
        _require(self.reduction != "none", 'topology.reduction "none" gives no loss')
        alone = "a sample's one neighbour has all of its probability"
        _require(self.neighbours != 1 or self.diagonal, f"topology.neighbours is 1; use 2 or more: {alone}")

    @property
    def active(self) -> bool:
        """Whether the loss has a topology term."""
        return self.weight > 0 or self.ratio > 0

    @property
    def needs_reference(self) -> bool:
        """Whether a standard model is needed."""
        return self.active or self.metrics


@dataclass(frozen=True)
class AWPConfig:
    """Adversarial weight perturbation (Wu et al. 2020): gamma 0.01 for AT, 0.005 for TRADES; 0 is off.

    Attributes:
        warmup: epochs before it begins.
    """

    gamma: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.gamma < 1, f"awp.gamma is {self.gamma}; it must be in [0, 1)")
        _require(0 <= self.warmup < inf, f"awp.warmup is {self.warmup}; it must be 0 or more")


@dataclass(frozen=True)
class AveragingConfig:
    """Weight averaging; the average is what is validated, kept and reported.

    Attributes:
        kind: "none", "ema" (after every step) or "swa" (after every epoch).
        decay: of the EMA.
        start: fraction of the run after which SWA begins.
        statistics: running statistics are "average"d like weights, or "recompute"d from adversarial batches
            against the average before each validation.
        batches: how many, for recomputing.
    """

    kind: AveragingKind = "none"
    decay: float = 0.999
    start: float = 0.5
    statistics: Literal["average", "recompute"] = "average"
    batches: int = 20

    def __post_init__(self) -> None:
        _require(0 < self.decay < 1, f"averaging.decay is {self.decay}; it must be between 0 and 1")
        _require(0 <= self.start < 1, f"averaging.start is {self.start}; it must be in [0, 1)")
        _require(self.batches >= 1, f"averaging.batches is {self.batches}; it must be 1 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD and its schedule.

    Attributes:
        lr: highest learning rate.
        weight_decay: 5e-4 is customary.
        schedule: "cosine", "onecycle" (linear up to `peak` of the run, cosine down), "multistep" (a tenth at each
            milestone) or "constant".
        peak: fraction of the run at which onecycle is highest.
        milestones: fractions of the run.
        clip_norm: largest norm of all gradients; 0 is off.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "multistep", "constant"] = "cosine"
    peak: float = 0.3
    milestones: tuple[float, ...] = (0.5, 0.75)
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < inf, f"optimizer.lr is {self.lr}; it must be positive")
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}; it must be in [0, 1)")
        _require(not self.nesterov or self.momentum > 0, "optimizer.nesterov needs an optimizer.momentum above 0")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(0 <= value < inf, f"optimizer.{name} is {value}; it must be 0 or more")
        _require(0 < self.peak < 1, f"optimizer.peak is {self.peak}; it must be between 0 and 1")
        fractions = all(0 <= each <= 1 for each in self.milestones)
        _require(fractions, f"optimizer.milestones are {self.milestones}; they are fractions of the run, in [0, 1]")


@dataclass(frozen=True)
class ValidationConfig:
    """A part of the training split, on which the best epoch is chosen.

    Attributes:
        fraction: held out, stratified, fixed by the run's seed.
        steps: of the PGD whose accuracy decides; for the host "standard" natural accuracy decides.
        every: epochs between two validations; the last epoch always has one.
        batch_size: images at once, here and in the final test.
        test: report best and last on the test split at the end (natural and PGD-20).
    """

    fraction: float = 0.02
    steps: int = 10
    every: int = 1
    batch_size: int = 500
    test: bool = True

    def __post_init__(self) -> None:
        _require(0 < self.fraction < 1, f"validation.fraction is {self.fraction}; it must be between 0 and 1")
        _require(min(self.every, self.batch_size, self.steps) >= 1, "validation settings must be 1 or more")


@dataclass(frozen=True)
class GuardConfig:
    """Detectors on the validation figures. They warn; with `stop` they end the training, which is then reported.

    Attributes:
        stop: end the training at a warning.
        drop: catastrophic overfitting: PGD accuracy fell by this share of its best between two validations.
        decline: robust overfitting: PGD accuracy is this far (in absolute accuracy) below its best ...
        patience: ... for so many validations in a row, while training accuracy still rises.
    """

    stop: bool = False
    drop: float = 0.5
    decline: float = 0.02
    patience: int = 3

    def __post_init__(self) -> None:
        _require(0 < self.drop <= 1, f"guard.drop is {self.drop}; it must be in (0, 1]")
        _require(0 <= self.decline <= 1, f"guard.decline is {self.decline}; it must be in [0, 1]")
        _require(self.patience >= 1, f"guard.patience is {self.patience}; it must be 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: folder of the run below the folder of runs.
        model: small-cnn, resnet18, preact-resnet18, wrn-16-4, wrn-28-10, wrn-34-10, timm/NAME, torchvision/NAME;
            left out: small-cnn for digits, else resnet18.
        host: standard, at, trades, mart, lbgat, fgsm-rs or n-fgsm.
        beta: left out: the published one (TRADES 6, MART 5, LBGAT 0).
        teacher: model of LBGAT's second network; left out: the same as `model`.
        batch_size: over all processes together.
        dtype: auto (bf16 on a GPU, else fp32), bf16 or fp32. Weights, images and attack arithmetic are fp32 always.
        engine: of attack and training forward: "eager", "compile", "graphs" (compiled, the whole attack one CUDA
            graph); "auto" is graphs on a GPU, else eager.
        deterministic: bit-identical runs also on a GPU, for some speed: with the engine "eager", or compiled in
            processes that share the compiler's cache (`TORCHINDUCTOR_CACHE_DIR`). A CPU is so anyway.
        checkpoint_every: further checkpoints after so many steps within an epoch; 0 is at epochs' ends only.
        log_every: steps between two looks at whether the loss is still finite.
    """

    name: str = "run"
    model: str | None = None
    host: HostName = "at"
    beta: float | None = None
    teacher: str | None = None
    epochs: int = 30
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    engine: Literal["auto", "eager", "compile", "graphs"] = "auto"
    deterministic: bool = False
    checkpoint_every: int = 0
    log_every: int = 50
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    awp: AWPConfig = field(default_factory=AWPConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1 and self.log_every >= 1, "epochs and log_every must be 1 or more")
        _require(self.batch_size >= 2, f"batch_size is {self.batch_size}; a batch of 1 has no neighbours")
        compared = self.batch_size > 2 or self.topology.diagonal or not self.topology.active
        _require(compared, "batch_size is 2; TRAIN compares each sample's neighbours and needs 3 samples or more")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be 0 or more, below 2**63")
        _require(self.checkpoint_every >= 0, f"checkpoint_every is {self.checkpoint_every}; it must be 0 or more")
        _require(self.beta is None or 0 <= self.beta < inf, f"beta is {self.beta}; it must be 0 or more")
        single = self.host in ("fgsm-rs", "n-fgsm")
        _require(not single or self.attack.norm == "Linf", f"host {self.host} is defined for Linf only")

    def resolved(self) -> TrainConfig:
        """The same with what was left out filled in, as far as it depends on the data's name."""
        small = self.data.name == "digits"
        epsilon = self.attack.epsilon if self.attack.epsilon is not None else (0.2 if small else 8 / 255)
        step = self.attack.step_size if self.attack.step_size is not None else epsilon / 4
        model = self.model if self.model is not None else ("small-cnn" if small else "resnet18")
        return replace(self, model=model, attack=replace(self.attack, epsilon=epsilon, step_size=step))
