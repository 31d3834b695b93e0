"""Scores of the experts of a sparse MLP; the highest stay."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...base.registry import Registry

Expert = list[Tensor]  # the weights, (out, in), of one expert


@dataclass
class ExpertInput:
    """The input of a scorer for the experts of one sparse MLP, on the dense stream.

    Attributes:
        name: of the experts' module.
        experts: dense weights of each expert, the last projection's last.
        seed: of this run.
        gated_norm: sum over the tokens that are routed to each expert of gate(t) ||f(x_t)||_2, (experts,) float64.
        gated_input: sum over these tokens of gate(t) |z_t|, z the input of each expert's last projection, (width,)
            float64.
        tokens: number of these tokens, (experts,).
    """

    name: str
    experts: list[Expert]
    seed: int
    gated_norm: Tensor
    gated_input: list[Tensor]
    tokens: Tensor


@dataclass
class RoutedSums:
    """Sums over the tokens that are routed to one expert."""

    gated_norm: float = 0.0
    gated_input: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0

    def add(self, x: Tensor, output: Tensor, routing: Tensor | None) -> None:
        """Add a call of the last projection: inputs, (tokens, width), outputs, (tokens, out), routing weights."""
        if routing is None:  # weighted before: what is not routed here is zero
            routed = x.any(-1)
            x, output, routing = x[routed], output[routed], torch.ones(int(routed.sum()), device=x.device)
        gate = routing.double()
        self.gated_norm += float(gate @ output.double().norm(dim=-1))
        self.gated_input = self.gated_input.to(x.device) + gate @ x.double().abs()
        self.tokens += len(x)


@dataclass(frozen=True)
class ExpertScorer:
    """A registered scorer of experts: takes an `ExpertInput`, returns (experts,) scores."""

    function: Callable[[ExpertInput], Tensor]
    needs_text: bool = True


EXPERT_SCORERS: Registry[ExpertScorer] = Registry("expert scorer", "optimum_barber.expert_scorers")


def reap(inputs: ExpertInput) -> Tensor:
    """Mean over an expert's tokens of gate(t) ||f(x_t)||_2 (REAP, arXiv 2510.13999); 0 without a token."""
    return inputs.gated_norm / inputs.tokens.clamp(min=1)


def bip(inputs: ExpertInput) -> Tensor:
    """Sum over an expert's channels of LLM-BIP's bound (arXiv 2412.06419, Eq. 9), weighted by the router.

    s = sum_j (sum_t gate(t) |z_tj|) sum_k |W_down[k, j]|, z the channels that the last projection reads.
    """
    scores = []
    for weights, channels in zip(inputs.experts, inputs.gated_input, strict=True):
        scores.append((weights[-1].double().abs().sum(0) * channels).sum())
    return torch.stack(scores)


def magnitude(inputs: ExpertInput) -> Tensor:
    """Sum of |W| over an expert's weights."""
    sums = []
    for weights in inputs.experts:
        parts = [weight.double().abs().sum() for weight in weights]
        sums.append(torch.stack(parts).sum())
    return torch.stack(sums)


def random(inputs: ExpertInput) -> Tensor:
    """Uniform scores; the seed and the module's name decide them."""
    digest = hashlib.sha256(f"{inputs.seed}:{inputs.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(len(inputs.experts), generator=generator)


EXPERT_SCORERS.add("reap", ExpertScorer(reap))
EXPERT_SCORERS.add("bip", ExpertScorer(bip))
EXPERT_SCORERS.add("magnitude", ExpertScorer(magnitude, needs_text=False))
EXPERT_SCORERS.add("random", ExpertScorer(random, needs_text=False))


def cut_experts(
    state: Mapping[str, Tensor], kept: Mapping[str, list[int]], rows: Mapping[str, str]
) -> dict[str, Tensor]:
    """A model's tensors by name without the experts that go.

    Args:
        state: tensors by name; not changed.
        kept: experts that stay, by the name of their module.
        rows: for every tensor that has one row an expert, the name of the experts' module.
    """
    result = dict(state)
    for name, module in rows.items():
        if name in state:
            index = torch.tensor(kept[module], device=state[name].device)
            result[name] = state[name].index_select(0, index)
    return result
