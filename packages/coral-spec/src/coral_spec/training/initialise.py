"""How a drafter's weights start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coral_spec.drafter import Drafter, DrafterConfig
from coral_spec.targets import Target
from expkit.errors import UsageError

_COPIED = (
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "post_attention_layernorm",
)
_FOLDED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def new_drafter(target: Target, how: str, seed: int) -> Drafter:
    """An fp32 drafter for `target` on its device; the same for the same seed, torch's own generator is left alone.

    Args:
        how: "random", or "last-layer": the decoder layer is the target's last one, with the norm before it folded
            into the projections, and `fc` passes the feature through. Ours.

    Raises:
        UsageError: "last-layer" for a target whose last layer has another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(DrafterConfig.from_target(target))
    if how == "last-layer":
        _copy_last_layer(drafter, target)
    return drafter.to(target.device, torch.float32)


@torch.no_grad()
def _copy_last_layer(drafter: Drafter, target: Target) -> None:
    model: Any = target.model
    decoder = model.get_decoder()
    source = {name: weight.float().cpu() for name, weight in decoder.layers[-1].state_dict().items()}
    own = drafter.layer.state_dict()
    extra = set(source) - {f"{name}.weight" for name in (*_COPIED, *_FOLDED, "input_layernorm")}
    wrong = [name for name in own if name not in source or source[name].shape != own[name].shape]
    if extra or wrong:
        raise UsageError(
            f'init = "last-layer" needs a plain Llama layer, but that of {target.name} differs in '
            f'{sorted({*extra, *wrong})[0]}; use init = "random"'
        )
    final = decoder.norm.weight.float().cpu()
    # features are normalised and scaled by the final norm; the layer expects the scale of its own input norm
    scale = source["input_layernorm.weight"] / torch.where(final.abs() < 0.05, torch.ones_like(final), final)
    new = {f"{name}.weight": source[f"{name}.weight"] for name in _COPIED}
    new |= {f"{name}.weight": source[f"{name}.weight"] * scale.clamp(-20, 20) for name in _FOLDED}
    drafter.layer.load_state_dict(new)
    width = drafter.config.hidden_size
    through: Tensor = torch.cat([0.02 * torch.randn(width, width, generator=_fixed()), torch.eye(width)], dim=1)
    drafter.fc.weight.copy_(through)


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
