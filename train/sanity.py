"""Checks of the model and of what trains it, each small enough to run before every run.

A check returns whether it passed, why, and how to mend what did not. They use the parts that
training uses (packer, loss, optimizer, step) and look at the outcome alone, so a fault anywhere
below shows. `train/sanity_run.py` has those of the machine, the data and the disk.

Left out: speed (`bench/`), and whatever needs more than a minute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import Batch, make_batch, pack_rows
from models.attention import KERNELS, attention, choose_kernel, document_mask
from models.config import ModelConfig
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train.loop import train_step
from train.loss import cross_entropy_loss
from train.state import Training
from utils.config import ConfigError, load_yaml, validate
from utils.cost_tracker import CostTracker
from utils.distributed import Distributed

MODEL_FILES = Path(__file__).resolve().parents[1] / "configs" / "model"
SHIPPED = {"smol_160m.yaml": 137_850_624, "smol_600m.yaml": 653_207_040}
ROW_TOKENS = 128
MEMORIZER = ModelConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=128, max_seq_len=64
)


class Result(NamedTuple):
    """What came of a check."""

    status: Literal["PASS", "FAIL", "SKIP"]
    reason: str
    remedy: str = ""


def passed(reason: str) -> Result:
    return Result("PASS", reason)


def failed(reason: str, remedy: str) -> Result:
    return Result("FAIL", reason, remedy)


def skipped(reason: str) -> Result:
    return Result("SKIP", reason)


def perform(check: Callable[..., Result], *arguments: object) -> Result:
    """Run a check; an error in it is a failure, and a user's mistake tells its own remedy."""
    try:
        return check(*arguments)
    except ConfigError as error:
        return failed(str(error), "")
    except Exception as error:  # that something below is broken is what a check is for
        reason = str(error).partition("\n")[0]
        return failed(
            f"{type(error).__name__}: {reason}", "compare the versions with constraints.txt"
        )


# ---------------------------------------------------------------------------------------------
# The model


def check_attention(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Result:
    """Every kernel that runs here against attention written out, forward and backward."""
    try:
        chosen, why = choose_kernel(requested, device, dtype, head_dim)
    except ValueError as error:
        return failed(str(error), "set runtime.attention: auto")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    agreed = []
    for kernel in KERNELS:
        try:
            choose_kernel(kernel, device, dtype, head_dim)
        except ValueError:
            continue  # it cannot run here, and `why` says so
        error = _attention_error(kernel, device, dtype, head_dim)
        if not error < tolerance:
            return failed(
                f"{kernel} differs from the reference by {error:.1e} of the largest value "
                f"(allowed {tolerance:.0e})",
                f"set runtime.attention to another than {kernel}, or install another version of it",
            )
        agreed.append(f"{kernel} {error:.0e}")
    return passed(f"{chosen} ({why}); deviations from the reference: {', '.join(agreed)}")


def _attention_error(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest deviation of outputs and gradients, relative to their largest values."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2, "upstream": 4}
    q, k, v, upstream = (
        torch.randn(2, ROW_TOKENS, n, head_dim, generator=generator).to(device, dtype)
        for n in heads.values()
    )
    ends = [50, 51, ROW_TOKENS, 2 * ROW_TOKENS, 2 * ROW_TOKENS]  # one token alone; an empty one
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    mask = document_mask(cu_seqlens, (2, ROW_TOKENS), kernel)

    def outcome(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    ours = outcome(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    wide = (x.double() for x in (q, k, v))
    reference = outcome(lambda q, k, v: _written_out(q, k, v, ends), *wide)
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours, reference, strict=True)
    )


def _written_out(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
    """Attention (B, T, H, D), a document and a head at a time."""
    out = torch.zeros_like(q).flatten(0, 1)  # (N, H, D)
    groups = q.shape[2] // k.shape[2]
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    for start, end in zip([0, *ends], ends, strict=False):
        for head in range(q.shape[2]):
            rows, shared = slice(start, end), head // groups
            scores = flat_q[rows, head] @ flat_k[rows, shared].T / math.sqrt(q.shape[3])
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            out[rows, head] = weights @ flat_v[rows, shared]
    return out.view(q.shape)


def check_parameter_counts(own: ModelConfig | None, folder: Path = MODEL_FILES) -> Result:
    """The shipped model files, and the run's own model: built, and counted by the formula."""
    shapes = {name: validate(ModelConfig, load_yaml(folder / name), name) for name in SHIPPED}
    expected = dict(SHIPPED)
    if own is not None:
        shapes["this config's"], expected["this config's"] = own, own.n_params
    for name, shape in shapes.items():
        with torch.device("meta"):
            built = sum(p.numel() for p in Transformer(shape).parameters())
        if not built == shape.n_params == expected[name]:
            return failed(
                f"{name}: {built:,} parameters built, {shape.n_params:,} by the formula, "
                f"{expected[name]:,} expected",
                "restore configs/model/ and models/ from the repository; a changed shape needs a "
                "model file of its own",
            )
    return passed(", ".join(f"{name} {count:,}" for name, count in expected.items()))


def random_batch(model: Transformer, lengths: list[int], rows: int = 4) -> Batch:
    """Rows of random tokens on the model's device, each holding documents of these lengths."""
    generator = np.random.default_rng(0)
    documents = [
        generator.integers(0, model.config.vocab_size, n) for _ in range(rows) for n in lengths
    ]
    packed = pack_rows(documents, sum(lengths), len(lengths))
    return make_batch(packed, sum(lengths), len(lengths)).to(model.device)


def row_tokens(model: Transformer) -> int:
    return min(ROW_TOKENS, model.config.max_seq_len)


@torch.no_grad()
def check_initial_loss(model: Transformer) -> Result:
    """A fresh model should know nothing: its loss is ln V, within 0.3.

    The head is the embedding, so a token at first speaks for itself, the more the wider the model
    and the longer the row: on rows of 128 random tokens its own logit adds 0.06 nats to the loss at
    1M parameters, 0.15 at 160M and 0.8 at 600M; on rows of 1,024 the loss begins 0.4 and 1.7 above
    ln V. That is the design and no fault, so a token's own logit is left out of the comparison.
    """
    batch = random_batch(model, [row_tokens(model)])
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)  # (B, T, C)
    logits = model.logits(hidden)[:, :-1].flatten(0, 1)  # (N, V)
    targets, own = batch.tokens[:, 1:].flatten(), batch.tokens[:, :-1].flatten()
    loss = F.cross_entropy(logits, targets).item()
    differs = targets != own
    others = logits.scatter(1, own[:, None], -math.inf)[differs]
    compared = F.cross_entropy(others, targets[differs]).item()
    expected = math.log(model.config.vocab_size)
    told = (
        f"{compared:.2f} nats without the tokens' own logits ({loss:.2f} with them) on rows of "
        f"{row_tokens(model)} random tokens; ln {model.config.vocab_size:,} = {expected:.2f}"
    )
    if abs(compared - expected) <= 0.3:
        return passed(told)
    return failed(f"{told}, allowed ± 0.3", "look at Transformer.init_weights, the norms, the head")


def check_gradients(model: Transformer) -> Result:
    """One forward and backward pass: all finite, and every parameter is reached."""
    batch = random_batch(model, [row_tokens(model)], rows=1)
    model.zero_grad(set_to_none=True)
    loss, _ = cross_entropy_loss(model, batch)
    loss.backward()
    remedy = "use runtime.precision: fp32 to tell rounding from a fault; look at that layer"
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in learning.items()}
    model.zero_grad(set_to_none=True)
    if not loss.isfinite():
        return failed(f"the loss is {loss.item()}", remedy)
    if len(learning) < len(list(model.parameters())):
        return failed("some parameters do not require a gradient", "look for requires_grad_(False)")
    for name, gradient in gradients.items():
        if gradient is None or not gradient.any():
            return failed(f"{name} gets no gradient", "look where its output is used, or detached")
        if not gradient.isfinite().all():
            return failed(f"the gradient of {name} is not finite", remedy)
    return passed(f"{len(gradients)} tensors, all reached and finite")


@torch.no_grad()
def check_documents_apart(model: Transformer) -> Result:
    """A changed token changes nothing before it, nor in other documents, but what comes after."""
    third = row_tokens(model) // 3
    batch = random_batch(model, [third, third, third], rows=2)
    changed, at = batch.tokens.clone(), third + third // 2
    changed[0, at] = (changed[0, at] + 1) % model.config.vocab_size
    hidden, again = (
        model(tokens, batch.positions, batch.cu_seqlens) for tokens in (batch.tokens, changed)
    )
    differs = (hidden != again).any(-1).cpu()  # (B, T)
    remedy = "set runtime.attention: dense; if it still fails, look at models/attention.py"
    if differs[0, third:at].any():
        return failed("a token changed what its model says of earlier tokens: not causal", remedy)
    if differs[0, :third].any() or differs[0, 2 * third :].any() or differs[1].any():
        return failed("a token changed another document's outputs: packed documents leak", remedy)
    if not differs[0, at : 2 * third].all():
        return failed("a token does not reach the later tokens of its own document", remedy)
    return passed("a token reaches itself and the later tokens of its own document, nothing else")


# ---------------------------------------------------------------------------------------------
# What trains it


def check_optimizer(model: Transformer, config: OptimConfig) -> Result:
    """Every parameter stands in exactly one group."""
    optimizer = make_optimizer(model.named_parameters(), config)
    times = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    remedy = "look at optim/param_groups.py"
    for name, parameter in model.named_parameters():
        if times[id(parameter)] != 1:
            return failed(f"{name} stands in {times[id(parameter)]} groups, not in one", remedy)
    if len(times) != len(list(model.parameters())):
        return failed("the optimizer holds tensors that are none of the model's", remedy)
    groups = ", ".join(f"{g['name']} {len(g['params'])}" for g in optimizer.param_groups)
    return passed(f"{config.kind}: {len(times)} tensors, each once ({groups})")


def check_overfitting(config: OptimConfig, device: torch.device, steps: int = 60) -> Result:
    """A small model learns one batch by heart, with the loop's own step."""
    torch.manual_seed(0)
    model = Transformer(MEMORIZER, kernel="dense").to(device)
    config = config.model_copy(update={"lr": 1e-2, "muon_lr": None, "weight_decay": 0.0})
    training = Training(
        model,
        make_optimizer(model.named_parameters(), config),
        Schedule(ScheduleConfig(decay_fraction=0.0), steps),
        iter(()),
        CostTracker(None, None),
        {},
    )
    batch = random_batch(model, [20, 44])
    dist = Distributed(0, 1, 0, device)
    losses = []
    for _ in range(steps):
        train_step(training, [batch], cross_entropy_loss, 1.0, dist)
        taken = training.averages.take()
        losses.append(taken["loss"] / max(taken["weight"], 1.0))
    told = f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {steps} steps on one batch"
    if losses[-1] < 0.1 * losses[0]:
        return passed(told)
    return failed(told, "look at the optimizer and train/loop.py: gradients or updates are lost")
