"""verifying: whether a changed model still computes what it did, up to rounding."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastres.versions import tensors_in

_TIMES: Final = 8.0  # how often the distance that rounding makes, which is measured once
_ULPS: Final = 32.0


class Verified:
    """What a model computes on an example, and how far rounding takes it.

    Outputs, the gradients of their product with fixed random numbers, and the buffers after the
    pass; and all of it once more with weights that differ in their last digits, after which no
    rounding in the pass is the same. Buffers, gradients and random generators stay as they are.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = args, kwargs
        self._plain = self._run(model, 0.0)
        floating = [t.dtype for t in self._plain.values() if t.is_floating_point()]
        self._eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
        self._noisy = self._run(model, self._eps)

    def difference(self, model: nn.Module) -> str:
        """Describe the first value that is further apart than rounding explains; "" if none is."""
        for name, value in self._run(model, 0.0).items():
            plain, noisy = (each.get(name) for each in (self._plain, self._noisy))
            if plain is None or noisy is None or plain.shape != value.shape:
                return f"{name} has another shape"
            if plain.dtype != value.dtype:
                return f"{name} has another dtype"
            scale, noise, found = (
                float(torch.nan_to_num(t.double()).norm())
                for t in (plain, noisy - plain, value - plain)
            )
            if not found <= _TIMES * noise + _ULPS * self._eps * scale:
                return f"{name} was {found:.2g} apart, and rounding explains {noise:.2g}"
        return ""

    def _run(self, model: nn.Module, noise: float) -> dict[str, Tensor]:
        """Run the model forward and backward with its weights times 1 + noise * N(0, 1)."""
        generator = torch.Generator().manual_seed(0)
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, self._given)
        cuda = {t.device.index for t in model.parameters() if t.is_cuda}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(sorted(cuda)),
        ):
            torch.manual_seed(0)
            state = {name: t.clone() for name, t in model.named_buffers()}
            weights = {}
            for name, t in model.named_parameters():
                factor = 1 + noise * torch.randn(t.shape, generator=generator).to(t)
                weights[name] = (t.detach() * factor).requires_grad_(t.requires_grad)
            out = torch.func.functional_call(model, weights | state, args, kwargs)
            outputs = [t for t in tensors_in(out) if t.is_floating_point()]
            found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
            found |= _gradients(outputs, weights, list(tensors_in((args, kwargs))), generator)
        return found | {f"buffer {name}": t for name, t in state.items()}


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def _gradients(
    outputs: list[Tensor],
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the gradients of a random combination of the outputs, by weights and inputs."""
    leaves = {f"gradient of {name}": t for name, t in weights.items() if t.requires_grad}
    leaves |= {f"gradient of input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    outputs = [t for t in outputs if t.requires_grad]
    if not outputs or not leaves:
        return {}
    generator.manual_seed(1)
    along = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    made = torch.autograd.grad(outputs, list(leaves.values()), along, allow_unused=True)
    return {name: g for name, g in zip(leaves, made, strict=True) if g is not None}
