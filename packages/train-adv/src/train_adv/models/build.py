"""Models by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from expkit.errors import UsageError
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.models.resnet import BasicBlock, PreActBlock, ResNet
from train_adv.models.small import SmallCNN
from train_adv.models.wide import WideResNet

CIFAR_FORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "small-cnn": lambda classes, channels: SmallCNN(classes, channels),
    "resnet18": lambda classes, channels: ResNet(BasicBlock, classes=classes, channels=channels),
    "preact-resnet18": lambda classes, channels: ResNet(PreActBlock, classes=classes, channels=channels),
    "wrn-16-4": lambda classes, channels: WideResNet(16, 4, classes, channels),
    "wrn-28-10": lambda classes, channels: WideResNet(28, 10, classes, channels),
    "wrn-34-10": lambda classes, channels: WideResNet(34, 10, classes, channels),
}


def build(spec: ModelSpec) -> Classifier:
    """A fresh model of this description.

    The name is one of `CIFAR_FORMS`, `timm/NAME`, `torchvision/NAME`, or a name that only one of the two knows.

    Raises:
        UsageError: an unknown name (near ones are given), or a library that is not installed.
    """
    classes, channels = len(spec.class_names), spec.image_shape[0]
    if spec.name in CIFAR_FORMS:
        return Classifier(CIFAR_FORMS[spec.name](classes, channels), spec)
    if spec.name == "custom":
        raise UsageError("this checkpoint holds a model of your own: pass it as model=")
    library, _, name = spec.name.rpartition("/")
    makers = {"timm": _timm, "torchvision": _torchvision}
    if library and library not in makers:
        raise UsageError(f'model "{spec.name}": unknown library "{library}"; use timm/NAME or torchvision/NAME')
    for each in [library] if library else list(makers):
        backbone = makers[each](name, classes, channels)
        if backbone is not None:
            return Classifier(backbone, spec)
    raise UsageError(f'unknown model "{spec.name}"{_near(name)}')


def _timm(name: str, classes: int, channels: int) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels)
    return model


def _torchvision(name: str, classes: int, channels: int) -> nn.Module | None:
    try:
        from torchvision import models
    except ImportError:
        return None
    if name not in models.list_models(module=models):
        return None
    if channels != 3:
        raise UsageError(f"torchvision's {name} takes 3 channels, and the images have {channels}; use a timm model")
    # Logits alone, also in train mode; the second key is the default, which they warn of where it is not said.
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, num_classes=classes, **plain)
    return model


def _near(name: str) -> str:
    known = list(CIFAR_FORMS)
    try:
        import timm

        known += timm.list_models()
    except ImportError:
        pass
    found = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"; did you mean {', '.join(found)}?" if found else f"; use one of {', '.join(CIFAR_FORMS)}, or a timm name"
