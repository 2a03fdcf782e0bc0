"""The gradients of a step as functions of tensors that draw nothing and wait for nothing: CUDA graphs on a GPU.

The networks are small: launching their kernels one by one takes a GPU's host several times as long as the GPU needs for
them. What is random, the optimisers and what processes tell each other stay outside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from expkit.device import autocast, synchronize
from expkit.errors import UsageError
from expkit.graphs import Captured
from pden.baselines.erm import Erm
from pden.baselines.randconv import convolved
from pden.generators import Generator
from pden.models import TaskModel
from pden.training.config import Engine, TrainConfig
from pden.training.learner import Learner
from pden.training.objectives import Expansion, generator_loss, task_loss
from pden.training.views import forward_views, make_views

Found = tuple[list[Tensor | None], dict[str, Tensor]]  # gradients of the learner's parameters, and the losses by name


def uses_graphs(engine: Engine, device: torch.device) -> bool:
    """Whether steps are recorded; "auto" records them on a GPU.

    Raises:
        UsageError: "graphs" without a GPU.
    """
    if engine == "graphs" and device.type != "cuda":
        raise UsageError(f'engine "graphs" needs a CUDA device, not {device}; use auto or eager')
    return engine != "eager" and device.type == "cuda"


class Steps:
    """The losses of one run, differentiated.

    What a call returns is valid until the next call of any method: recordings share their memory. In which mode (train
    or eval) a call leaves the task model is not said.

    Args:
        learner: of the task model.
        graphs: whether they are recorded.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: TaskModel,
        learner: Learner,
        baseline: Erm,
        device: torch.device,
        dtype: torch.dtype,
        graphs: bool,
    ) -> None:
        self.config, self.task, self.learner, self.baseline = config, task, learner, baseline
        self.device, self.graphs = device, graphs
        self._precision = partial(autocast, device, dtype)
        # What is recorded holds no Steps: a cycle would leave graphs to the collector.
        self._captured: dict[object, Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._seats: dict[type[Generator], Generator] = {}

    def plain(self, views: Tensor, labels: Tensor) -> Found:
        """The baseline's loss, of the views that it made."""
        task, learner, baseline, precision = self.task, self.learner, self.baseline, self._precision

        def differentiate(views: Tensor, labels: Tensor) -> Found:
            task.train()
            with precision():
                loss = baseline.loss(task, views, labels)
            return learner.gradients(loss), {"loss": loss.detach()}

        return self._call("plain", differentiate, views, labels)

    def expand(
        self, expansion: Expansion, expander: Learner, images: Tensor, labels: Tensor, noises: Sequence[Tensor]
    ) -> Found:
        """What the generator minimises; the task model in eval mode."""
        task, weights, precision = self.task, self.config.loss, self._precision

        def differentiate(images: Tensor, labels: Tensor, *noises: Tensor) -> Found:
            task.eval()
            with precision():
                total, parts = generator_loss(task, expansion, images, labels, noises, weights)
            return expander.gradients(total), _detached(parts)

        return self._call("expand", differentiate, images, labels, *noises)

    def tune(
        self,
        current: Generator,
        earlier: Generator | None,
        images: Tensor,
        labels: Tensor,
        draws: Sequence[Tensor],
        textures: Sequence[Tensor] = (),
    ) -> Found:
        """What the task model minimises over the views that `make_views` makes of these, each under its random
        convolution where `textures` (see `RandConv.draw`) has them."""
        task, learner, config, precision = self.task, self.learner, self.config, self._precision
        seat = None if earlier is None else self._seat(earlier)

        count = len(draws)

        def differentiate(images: Tensor, labels: Tensor, *inputs: Tensor) -> Found:
            task.train()
            with precision():
                views = make_views(images, inputs[:count], current, seat)
                if len(inputs) > count:
                    with torch.no_grad():
                        views = [convolved(*each) for each in zip(views, *inputs[count:], strict=True)]
                output = forward_views(task, views, config.model.batch_norm)
            total, parts = task_loss(output, labels, config.loss)  # fp32, similarities too
            return learner.gradients(total), _detached(parts)

        return self._call(("tune", type(seat)), differentiate, images, labels, *draws, *textures)

    def forget(self) -> None:
        """Drop the recordings: to be called when there is another expansion."""
        if self._captured:
            synchronize(self.device)  # they may be running
            self._captured.clear()
            torch.cuda.empty_cache()  # recordings' memory serves nothing else
            self._pool = torch.cuda.graph_pool_handle()

    def _call(self, key: object, function: Callable[..., Found], *inputs: Tensor) -> Found:
        if not self.graphs:
            return function(*inputs)
        found: Found = self._captured.setdefault(key, Captured(function, True, [self.task], self._pool))(*inputs)
        return found

    def _seat(self, earlier: Generator) -> Generator:
        """An earlier generator in the module that recordings read: each step has another one."""
        if not self.graphs:
            return earlier
        if type(earlier) not in self._seats:
            self._seats[type(earlier)] = copy.deepcopy(earlier)
        seat = self._seats[type(earlier)]
        torch._foreach_copy_(list(seat.parameters()), list(earlier.parameters()))
        return seat


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parts.items()}
