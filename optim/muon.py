"""Muon: the matrices inside the blocks are updated by their momentum, made orthogonal.

A gradient's few large singular values decide where AdamW goes; Muon sets all of them to about 1, by
five Newton-Schulz iterations in bf16, which need matrix products alone. Embedding, norms and heads
are no maps between hidden states and stay with AdamW, in the same object, since a run has one.

The update of an (A, B) matrix is scaled by 0.2 sqrt(max(A, B)): its root mean square is then about
0.2, as AdamW's is, and rates and weight decay that suit AdamW suit Muon. Matrices of equal shape go
through the iteration together: at 160M 126 of them in 4 stacks.

Sources: Jordan et al. 2024 (the method and the coefficients), Liu et al. 2025 ("Muon is scalable
for LLM training", the scale). `torch.optim.Muon` computes the same, a matrix at a time, and cannot
skip a step on the device. Left out: sharing the iterations between GPUs (each does all of them),
and matrices of other shapes than two dimensions.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero; end between 0.7 and 1.2, not at 1
ITERATIONS = 5
UPDATE_RMS = 0.2
STACK_ELEMENTS = 2**26  # 256 MiB of float32; a step holds about five such


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that have a "momentum", fused AdamW for the others.

    As with fused AdamW, `grad_scale` divides the gradients and `found_inf` (1.0) leaves parameters
    and state as they are; both are tensors, and nothing waits for them.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step; the gradients that Muon has used are None afterwards."""
        for group in self.param_groups:
            if "momentum" in group:
                for matrices in _by_shape(group["params"]):
                    self._step_matrices(matrices, group)
        super().step()  # passes over parameters without a gradient

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Step n matrices of one shape (A, B)."""
        gradient = torch.stack([m.grad for m in matrices])  # (n, A, B)
        good = torch.ones((), device=gradient.device)
        if getattr(self, "grad_scale", None) is not None:
            gradient.div_(self.grad_scale)
        if getattr(self, "found_inf", None) is not None:
            gradient.masked_fill_(self.found_inf.bool(), 0.0)  # NaN times 0 would still be NaN
            good = 1.0 - self.found_inf
        states = [self._state_of(m) for m in matrices]
        kept = [state["momentum_buffer"] for state in states]
        momentum = torch.stack(kept).lerp_(gradient, (1 - group["momentum"]) * good)
        torch._foreach_copy_(kept, momentum.unbind())
        torch._foreach_add_([state["step"] for state in states], [good] * len(states))
        update = orthogonalized(gradient.lerp_(momentum, group["momentum"]))  # Nesterov's
        scale = UPDATE_RMS * max(gradient.shape[1:]) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"] * good)
        torch._foreach_add_(matrices, (update * (-group["lr"] * scale * good)).unbind())
        for matrix in matrices:
            matrix.grad = None

    def _state_of(self, matrix: Tensor) -> dict[str, Tensor]:
        state = self.state[matrix]
        if not state:
            state["step"] = torch.zeros((), device=matrix.device)  # which AdamW looks for
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V' of each matrix U S V' of (n, A, B), roughly; float32, a zero matrix stays zero."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()


def _by_shape(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, those of equal shape together, up to a stack's size."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault(parameter.shape, []).append(parameter)
    for shape, matrices in alike.items():
        most = max(1, STACK_ELEMENTS // shape.numel())
        yield from (matrices[i : i + most] for i in range(0, len(matrices), most))
