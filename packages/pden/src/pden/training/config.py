"""Every setting of a run, as read from `--config FILE`. The preset `paper` has the paper's; defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

Engine = Literal["auto", "graphs", "eager"]
METHODS = ("pden", "erm", "randaugment", "augmix", "randconv", "ada", "me-ada")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and what is only reported on.

    Attributes:
        source: a name, a folder of class folders, or FILE.npz#x_key,y_key.
        targets: domains that models are measured on. They are never seen in training or selection.
        target_every: rounds between two such measurements; 0 measures the end alone. The last round always counts.
        validation: a domain of the source's own kind to select on; empty holds a share of the source out.
        validation_share: that share.
        disguised: how many held-out images each round is also measured on in disguise, a figure that settings may be
            chosen by without a target (pden.evaluation.disguise); 0 leaves it out. It decides nothing in a run.
        size: side of the images after bilinear resizing; 0 leaves images as they are.
        channels: 3 copies grey images; 1 takes the luminance of colour.
        augment: of the source in every method: "crop-flip" pads by an eighth, crops and mirrors.
        randaugment: share of the rounds' batches, in every method, on which RandAugment works first (ours).
        randconv: share of the rounds' batches, in every method, that go through a random convolution first (ours:
            domains then start from many textures; what it makes may leave [0, 1], as in RandConv); under torchrun each
            process draws for its part of a batch. See `pden.baselines.randconv.RandConv.convolved`.
        randconv_of: "batches" convolves what the generator and all views start from; "views" that share of the views,
            each by itself, and the task model's alone: PDEN only.
    """

    source: str = "digits"
    targets: tuple[str, ...] = ()
    target_every: int = 1
    validation: str = ""
    validation_share: float = 0.1
    disguised: int = 1000
    size: int = 32
    channels: int = 3
    augment: Literal["none", "crop-flip"] = "none"
    randaugment: float = 0.0
    randconv: float = 0.0
    randconv_of: Literal["batches", "views"] = "batches"

    def __post_init__(self) -> None:
        _require(0 < self.validation_share < 1, f"data.validation_share is {self.validation_share}; use 0 to 1")
        _require(self.disguised >= 0, f"data.disguised is {self.disguised}; it must be 0 or more")
        _require(self.size == 0 or self.size >= 8, f"data.size is {self.size}; use 0 or at least 8")
        for key, share in (("randaugment", self.randaugment), ("randconv", self.randconv)):
            _require(0 <= share <= 1, f"data.{key} is {share}; it is a share, 0 to 1")
        _require(self.channels in (1, 3), f"data.channels is {self.channels}; use 1 or 3")


@dataclass(frozen=True)
class ModelConfig:
    """The task model.

    Attributes:
        name: digits, wrn-16-4, timm:NAME; fcn-resnet50 or fcn-small for segmentation.
        width: factor on the layers of digits and fcn-small.
        embedding: size of the projection head's output.
        batch_norm: how the views of a step are normalised. "joint": together; "split": each view by its own
            statistics, all of which enter the running ones; "source": the same, but only the source's enter;
            "frozen": by the running statistics of pre-training.
    """

    name: str = "digits"
    width: float = 1.0
    embedding: int = 128
    batch_norm: Literal["joint", "split", "source", "frozen"] = "joint"

    def __post_init__(self) -> None:
        _require(0 < self.width < inf and self.embedding >= 1, "model.width and model.embedding must be positive")


@dataclass(frozen=True)
class GeneratorConfig:
    """The domain generators.

    Attributes:
        kinds: photometric, geometric or composite; rounds take them in turn.
        width: channels after the first convolution; 0 is 16 up to 64 pixels and 32 above.
        noise: size of z.
        grid: side of the grid on which a photometric generator's style differs by place, so that grounds are uneven
            (ours; see `pden.generators.AdaIN`); 0 is one style for a whole image, as in the paper.
        grid_share: part of a domain's draws in which it does; the others have one style.
        lr: of Adam.
        share: part of a round's steps in which the generator learns; after it the generator is frozen.
    """

    kinds: tuple[Literal["photometric", "geometric", "composite"], ...] = ("photometric",)
    width: int = 0
    noise: int = 10
    grid: int = 0
    grid_share: float = 1.0
    lr: float = 1e-4
    share: float = 0.5

    def __post_init__(self) -> None:
        _require(len(self.kinds) >= 1, "generator.kinds is empty")
        _require(self.noise >= 1, f"generator.noise is {self.noise}; it must be positive")
        _require(min(self.width, self.grid) >= 0, "generator.width and generator.grid must be 0 or more")
        _require(0 < self.grid_share <= 1, f"generator.grid_share is {self.grid_share}; it must be in (0, 1]")
        _require(self.grid_share == 1 or self.grid > 0, "generator.grid_share is a share of a generator.grid; set that")
        _require(not self.grid or set(self.kinds) != {"geometric"}, "generator.grid is for photometric domains")
        _require(0 < self.share <= 1 and 0 < self.lr < inf, "generator.share must be in (0, 1], generator.lr positive")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the defaults are the paper's.

    Attributes:
        safety, diversity, cycle, adversarial: of the generator's losses; 0 leaves one out.
        diversity_limit: beyond which two draws need not differ more.
        cycle: in short rounds the paper's 20 keeps domains near the source, and less teaches more (RESULTS.md).
        contrast: of the task model across views: none, instance, supervised, barlow. Small runs do not
            tell them apart (RESULTS.md).
        contrast_weight: its weight. Barlow Twins sums over features and needs a small one.
        temperature: of both contrasts.
        off_diagonal: of Barlow Twins.
        consistency: weight of the Jensen-Shannon divergence of the views' predictions (ours; AugMix and RandConv have
            it, with 12 and 10).
        mix: whether mixtures of source and earlier domain are a view of their own.
    """

    safety: float = 1.0
    diversity: float = 2.0
    diversity_limit: float = 0.5
    cycle: float = 20.0
    adversarial: float = 0.1
    contrast: Literal["none", "instance", "supervised", "barlow"] = "instance"
    contrast_weight: float = 1.0
    temperature: float = 0.07
    off_diagonal: float = 0.005
    consistency: float = 0.0
    mix: bool = True

    def __post_init__(self) -> None:
        generator = (self.safety, self.diversity, self.cycle, self.adversarial)
        weights = (*generator, self.contrast_weight, self.off_diagonal, self.consistency)
        _require(all(0 <= each < inf for each in weights), "loss weights must be numbers of 0 or more")
        _require(self.diversity_limit > 0, f"loss.diversity_limit is {self.diversity_limit}; it must be positive")
        _require(0 < self.temperature < inf, f"loss.temperature is {self.temperature}; it must be positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """Of the task model.

    Attributes:
        kind: "sgd" has Nesterov momentum.
        schedule: "cosine" falls to 0 over pre-training, and again over all rounds together.
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        _require(0 < self.lr < inf, f"optimizer.lr is {self.lr}; it must be positive")
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}; use 0 to 1")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")


@dataclass(frozen=True)
class GateConfig:
    """The safety gate (ours): each finished domain is measured on held-out source images.

    Its limits were set while the embedded digits' targets were looked at, to refuse what destroys labels and no more.

    Attributes:
        mode: "on" refuses domains, "record" only measures them, "off" does neither.
        images: how many are measured.
        agreement: least share of them that the task model still labels rightly in the new domain.
        worst_class: least such share of any one class that has 20 images or more among them.
        judge_over_chance: least share for the judge, in multiples of chance (the share of the most frequent class; in
            segmentation 1 / classes), though never beyond halfway from chance to all. The judge is a model of another
            seed that has seen the source alone, as it is and in random disguise (random convolutions and negatives),
            and no domain. It is no oracle: a demanding limit refuses just the domains that teach most. So classes that
            a domain exchanges, which the task model learns again as exchanged, pass.
        distance: least distance from the source: 1 - cosine of the judge's features, mean over images.
        novelty: least distance from the nearest earlier domain, measured in the same way.
        retries: how often a refused domain is learned anew before it is dropped.
        judge_steps, judge_lr: the judge's training (Adam).
        collapse: diversity under which a generator counts as collapsed, which is warned of.
    """

    mode: Literal["on", "record", "off"] = "on"
    images: int = 1000
    agreement: float = 0.7
    worst_class: float = 0.1
    judge_over_chance: float = 1.2
    distance: float = 0.02
    novelty: float = 0.0
    retries: int = 1
    judge_steps: int = 500
    judge_lr: float = 1e-3
    collapse: float = 0.01

    def __post_init__(self) -> None:
        _require(self.images >= 1 and self.judge_steps >= 1, "gate.images and gate.judge_steps must be positive")
        _require(self.retries >= 0, f"gate.retries is {self.retries}; it must be 0 or more")
        for key in ("agreement", "worst_class", "judge_over_chance", "distance", "novelty", "collapse"):
            limit = getattr(self, key)
            _require(0 <= limit < inf, f"gate.{key} is {limit}; it must be a number of 0 or more")
        _require(self.judge_lr > 0, f"gate.judge_lr is {self.judge_lr}; it must be positive")


@dataclass(frozen=True)
class AveragingConfig:
    """Averaged weights beside the last ones. "ema" decays, "uniform" weighs all steps from a round on alike."""

    kind: Literal["none", "ema", "uniform"] = "ema"
    decay: float = 0.9995
    from_round: int = 1

    def __post_init__(self) -> None:
        _require(0 < self.decay < 1, f"averaging.decay is {self.decay}; it must be between 0 and 1")
        _require(self.from_round >= 1, f"averaging.from_round is {self.from_round}; rounds count from 1")


@dataclass(frozen=True)
class StopConfig:
    """Fewer rounds than K, decided on the source alone.

    Attributes:
        patience: end after this many rounds in a row that brought nothing new; 0 never does.
        novelty: a domain that is nearer than this to an earlier one is nothing new; a dropped one never is.
    """

    patience: int = 0
    novelty: float = 0.02

    def __post_init__(self) -> None:
        _require(0 <= self.novelty < inf, f"stop.novelty is {self.novelty}; it must be a number of 0 or more")
        _require(self.patience >= 0, f"stop.patience is {self.patience}; it must be 0 (never) or more")


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        name: folder of the run below the folder of runs.
        method: pden, or a baseline in the same harness: erm, randaugment, augmix, randconv, ada, me-ada.
        rounds: K; 0 is plain training on the source (ERM).
        pretrain_steps, pretrain_batch: on the source, before the first round.
        round_steps, batch: of a round. Baselines train for as many steps. Batches are divided among processes.
        dtype: fp32, bf16 (autocast), or auto (bf16 where the device computes in it).
        engine: "graphs" records forward and backward as CUDA graphs; "eager" launches every kernel; "auto" is graphs on
            a GPU. A backbone of timm's that waits for the device within them needs eager.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; each round's end has one too.
    """

    name: str = "pden"
    method: Literal["pden", "erm", "randaugment", "augmix", "randconv", "ada", "me-ada"] = "pden"
    rounds: int = 20
    pretrain_steps: int = 5000
    pretrain_batch: int = 256
    round_steps: int = 3000
    batch: int = 128
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"
    engine: Engine = "auto"
    log_every: int = 50
    checkpoint_every: int = 1500
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    def __post_init__(self) -> None:
        _require(self.rounds >= 0, f"rounds is {self.rounds}; it must be 0 (ERM) or more")
        _require(self.pretrain_steps >= 1 and self.round_steps >= 2, "pretrain_steps and round_steps must be positive")
        _require(min(self.batch, self.pretrain_batch) >= 2, "batches need at least 2 images")
        _require(min(self.log_every, self.checkpoint_every) >= 1, "log_every and checkpoint_every must be positive")
        _require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")
        _require(
            self.data.randconv_of == "batches" or self.method == "pden",
            f'data.randconv_of = "views" is for method pden; {self.method} makes views of its own and takes "batches"',
        )
        _require(
            self.stop.patience == 0 or self.gate.mode != "off" or self.method != "pden",
            'stop.patience counts what the gate measures; set gate.mode to "on" or "record"',
        )

    @property
    def learning_steps(self) -> int:
        """Steps of a round in which the generator learns."""
        return max(1, round(self.generator.share * self.round_steps))
