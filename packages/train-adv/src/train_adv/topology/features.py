"""Pooled features of any model: the input of its classifier, or the output of a layer that the caller names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from expkit.errors import UsageError


class FeatureTap:
    """Reads features while the model runs; models need no change.

    Args:
        model: timm, torchvision or any other module.
        layer: "auto" taps the input of the classifier (timm's `get_classifier`, else the last linear layer, else the
            last convolution);
            "logits" the model's output; any other name is that of a submodule, whose output is tapped and averaged
            over space (batch, channels, height, width) or tokens (batch, tokens, dim).

    Attributes:
        features: (batch, dim) of the latest forward, with its gradient; None before one and after `take`.
        listening: whether forwards are noted at all; what is noted keeps its graph alive until it is taken.

    Raises:
        UsageError: no such layer (the nearest name is given), or no linear layer for "auto".
    """

    def __init__(self, model: nn.Module, layer: str = "auto") -> None:
        self.features: Tensor | None = None
        self.listening = True
        self.layer = layer
        if layer == "logits":
            self._handle = model.register_forward_hook(self._keep_output)
        elif layer == "auto":
            self._handle = classifier_of(model).register_forward_pre_hook(self._keep_input)
        else:
            self._handle = named_layer(model, layer).register_forward_hook(self._keep_output)

    def take(self) -> Tensor:
        """The features of the latest forward, which are then forgotten, so that no graph is kept alive."""
        if self.features is None:
            raise UsageError(f'the layer "{self.layer}" did not run in the forward pass; name another one')
        features, self.features = self.features, None
        return features

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which start with nothing noted: features of a graph cannot be copied."""
        return {**self.__dict__, "features": None}

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.listening:
            self.features = pooled(inputs[0])

    def _keep_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.listening:
            self.features = pooled(output)


def feature_reader(model: nn.Module, layer: str = "auto") -> tuple[Callable[[Tensor], Tensor], FeatureTap | None]:
    """A function from images to features, and the tap that it needed.

    A model that has `with_features` (a `Classifier`) gives them itself, unless another layer is asked for.
    """
    own: Any = getattr(model, "with_features", None)
    if layer == "auto" and own is not None:
        return lambda images: own(images).features, None
    tap = FeatureTap(model, layer)

    def read(images: Tensor) -> Tensor:
        model(images)
        return tap.take()

    return read, tap


def pooled(output: Any) -> Tensor:
    """(batch, dim) from (batch, channels, height, width), (batch, tokens, dim) or (batch, dim); means are in fp32."""
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"features are {shape}; expected a tensor of 2 to 4 dimensions")
    if output.ndim == 4:
        return output.float().mean(dim=(2, 3))
    return output.float().mean(dim=1) if output.ndim == 3 else output


def classifier_of(model: nn.Module) -> nn.Module:
    """The linear layer, or else the convolution, that gives the logits."""
    getter: Any = getattr(model, "get_classifier", None)  # timm
    found: Any = getter() if callable(getter) else None
    if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
        return found
    for kind in (nn.Linear, nn.Conv2d):  # a network without a linear layer has a convolution in its place
        found = [module for module in model.modules() if isinstance(module, kind)]
        if found:
            return found[-1]  # type: ignore[no-any-return]
    raise UsageError(f"{type(model).__name__} has no linear layer to take features from; name a feature layer")


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`; UsageError names the nearest one there is."""
    names: dict[str, nn.Module] = dict(model.named_modules())
    if name in names and name:
        return names[name]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f'; did you mean "{nearest[0]}"?' if nearest and nearest[0] else ""
    raise UsageError(f'{type(model).__name__} has no layer "{name}"{hint}')
