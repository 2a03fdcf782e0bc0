"""What multiplies in which precision on a GPU: training in TF32 (or bf16), what is measured in whole fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Matrix products and convolutions of fp32 tensors in TF32, or in whole fp32. Torch's default is one of each."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.allow_tf32 = matmul.allow_tf32 = on
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
