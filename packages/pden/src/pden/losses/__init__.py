"""The losses, one file each; all of them pure functions on tensors."""

from pden.losses.adversarial import adversarial_contrast
from pden.losses.barlow import barlow_twins
from pden.losses.consistency import jensen_shannon
from pden.losses.cycle import cycle_loss
from pden.losses.diversity import diversity, diversity_loss
from pden.losses.instance import instance_contrast
from pden.losses.safety import safety_loss
from pden.losses.supervised import supervised_contrast

__all__ = [
    "adversarial_contrast",
    "barlow_twins",
    "cycle_loss",
    "diversity",
    "diversity_loss",
    "instance_contrast",
    "jensen_shannon",
    "safety_loss",
    "supervised_contrast",
]
