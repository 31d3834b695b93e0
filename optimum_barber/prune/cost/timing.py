"""How long a run takes: the work of its stages, over what a machine does in a second. Arithmetic; `rates` measures."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ...tensors.sums import entries
from ..block_quadratic import PROBED
from ..rebuilders.base import REBUILDERS, StatisticsRebuilder
from ..rebuilders.gauss_newton import EACH
from ..rebuilders.ratio import stride_of
from ..rebuilders.swaps import BEFORE_NEWTON
from ..reconstructions.gradient import HELD_OUT
from ..settings import BarberConfig
from .work import BlockShape, Tokens, Work, weights_of

CANDIDATES = (4, 3)  # ratios that the search measures in the first round and in a later one: typical, data decide
LENGTHS = 3  # that a round of 'gauss-newton' tries: typical
SHARING = frozenset({"barber", "swaps", "gauss-newton"})  # rebuilders that call `share_last_pass`
ADAM = 12  # operations on weights of one of its steps
CONJUGATE = 8  # operations on weights of one iteration of conjugate gradients, beside the product


def stages(
    shapes: Sequence[BlockShape], tokens: Tokens, config: BarberConfig, needs: Iterable[str], checkpoint: int
) -> dict[str, Work | None]:
    """The work of a run by its stages; None for a plug-in, of which nothing is known.

    Args:
        shapes: of all blocks.
        tokens: what is calibrated on.
        config: everything else that decides the run.
        needs: statistics that the producer asks for.
        checkpoint: bytes that are written of weights and masks.
    """
    found: dict[str, Work | None] = {}
    for shape in shapes:
        for name, work in _block(shape, tokens, config, frozenset(needs)).items():
            before = found.get(name, Work())
            found[name] = None if work is None or before is None else before + work
    moved = 4 * tokens.count * tokens.hidden * len(shapes) // 2  # what enters a layer, for resuming
    pruned = sum(shape.weights for shape in shapes)
    return {**found, "check, write, verify": Work(kept=pruned, written=checkpoint + moved)}


def _block(shape: BlockShape, tokens: Tokens, config: BarberConfig, needs: frozenset[str]) -> Mapping[str, Work | None]:
    found: dict[str, Work | None] = {"dense pass, statistics": _observe(shape, tokens, config, needs)}
    if not shape.linears:
        return found
    found["producer"] = _produce(shape, needs)
    if not config.rebuild.chain:
        found["error of the masks"] = shape.masked(tokens)
    for kinds, chain in ((REBUILD, config.rebuild.chain), (RECONSTRUCT, config.reconstruct.chain)):
        for index, link in enumerate(chain, start=1):
            count = kinds.get("+".join(chain[index - 1 : index + 1]), kinds.get(link))
            parts = dict(count(shape, tokens, config)) if count else {link: None}
            if kinds is REBUILD and _measured_by_the_next(config, index):
                parts.pop(f"{link}: last masks", None)
            for name, work in parts.items():
                before = found.get(name, Work())
                found[name] = None if work is None or before is None else before + work
    return found


def _measured_by_the_next(config: BarberConfig, index: int) -> bool:
    """Whether the first pass of what follows the index-th rebuilder, from 1, is also the measurement of its masks."""
    chain = config.rebuild.chain
    if index == len(chain):
        return False
    if config.rebuild.accept == "always":
        return True
    return chain[index - 1] in SHARING and isinstance(REBUILDERS[chain[index]], StatisticsRebuilder)


def _observe(shape: BlockShape, tokens: Tokens, config: BarberConfig, needs: frozenset[str]) -> Work:
    """The dense pass, the sums over inputs, and the residual stream in front of and behind the block."""
    squares = sum(entries(width) for width in shape.inputs) if "gram" in needs else 0
    sums = sum(shape.inputs) * len(needs - {"gram"})
    streams = 4 * tokens.hidden * (2 if config.rebuild.error == "relative" else 1)
    return shape.forward(tokens) + Work(gram=2 * tokens.count * squares, pointwise=tokens.count * (sums + streams))


def _produce(shape: BlockShape, needs: frozenset[str]) -> Work:
    """Choosing the first masks; with a Gram matrix also its factor, and the errors pushed on to later columns."""
    work = Work(chosen=shape.weights)
    if "gram" in needs:
        cubes = sum(width**3 for _, width in shape.linears)
        work += Work(factored=4 * cubes / 3, forward=sum(out * width**2 for out, width in shape.linears))
    return work


def _barber(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """A gradient pass and a ranking a round, the candidates of a search, and the last masks measured."""
    rounds = config.rebuild.rounds
    again = shape.masked(tokens) * (rounds if config.rebuild.expansion == "dense" else 0)  # its target is of its own
    found = {
        "barber: gradients": shape.gradient(tokens) * rounds + again,
        "barber: ranking": Work(ranked=shape.weights, applied=shape.weights) * rounds,
    }
    if config.rebuild.rebuild_ratio == "auto":
        candidates = CANDIDATES[0] + CANDIDATES[1] * (rounds - 1)
        some = len(range(0, tokens.samples, stride_of(tokens.samples))) / tokens.samples
        tried = shape.forward(tokens) * some + Work(weights=shape.weights, applied=shape.weights)
        found["barber: search"] = tried * candidates
    return found | {"barber: last masks": shape.masked(tokens)}


def _first_sample(shape: BlockShape, tokens: Tokens) -> Work:
    """By which it is found which Linear closes the block."""
    return shape.forward(tokens) * (1 / tokens.samples)


def _swaps(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """A pass with Gram matrices for all Linears but the closing one, one for that, and the last masks measured."""
    gathered = shape.masked(tokens) * min(len(shape.linears), 2) + shape.grams(tokens)
    found = _exchanges(shape, tokens, gathered, shape.weights, config.rebuild.swaps)
    return {**found, "swaps: last masks": shape.last(tokens)}


def _inner_swaps(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """The same without the closing Linear, which is left to 'gauss-newton', unless it is the only one."""
    inner = weights_of(shape.linears[:-1])
    if not inner:
        return _swaps(shape, tokens, config)
    most = min(config.rebuild.swaps, BEFORE_NEWTON) if ":" in (config.pattern or "") else config.rebuild.swaps
    return _exchanges(shape, tokens, shape.masked(tokens) + shape.inner_grams(tokens), inner, most)


def _exchanges(shape: BlockShape, tokens: Tokens, gathered: Work, weights: int, most: int) -> dict[str, Work]:
    return {
        "swaps: Gram matrices": gathered + _first_sample(shape, tokens),
        "swaps: exchanges": Work(exchanged=weights * most),
        "swaps: last masks": shape.masked(tokens),
    }


def _gauss_newton(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """A gradient pass a round, the candidates, a pass with the Gram matrix of the closing Linear; random signs once.

    The other Gram matrices are summed in the first pass, which is `swaps`' where that comes before.
    """
    rounds, closing = config.rebuild.newton_rounds, weights_of(shape.linears[-1:] if len(shape.linears) > 1 else ())
    slopes = shape.gradient(tokens) + Work(backward=-2 * tokens.count * closing)  # none of the closing weights
    probes = (slopes + shape.forward(tokens) * -1.0) * (len(range(0, tokens.samples, PROBED)) / tokens.samples)
    some = len(range(0, tokens.samples, stride_of(tokens.samples))) / tokens.samples
    step = Work(exchanged=EACH * (shape.weights - closing))
    found = {
        "gauss-newton: gradients": slopes,
        "gauss-newton: search": (shape.masked(tokens) * some + step) * LENGTHS,
        "gauss-newton: closing Linear": (shape.masked(tokens) + Work(gram=2 * tokens.count * closing)) * bool(closing)
        + Work(exchanged=closing * config.rebuild.swaps),
    }
    found = {name: work * rounds for name, work in found.items()}
    once = shape.closing_grams(tokens).gram - 2 * tokens.count * closing  # the correlation is every round's
    found["gauss-newton: closing Linear"] += Work(gram=once * bool(closing))
    summed = "swaps" in config.rebuild.chain[: config.rebuild.chain.index("gauss-newton")]
    found["gauss-newton: gradients"] += probes + Work(gram=shape.inner_grams(tokens).gram * (not summed))
    return found | {"gauss-newton: last masks": shape.last(tokens)}


def _dsnot(shape: BlockShape, tokens: Tokens, _: BarberConfig) -> dict[str, Work]:
    """A pass with the inputs' means and variances, one selection of each kind a Linear, and the masks measured."""
    sums = 2 * tokens.count * sum(shape.inputs)
    seen = shape.masked(tokens) + Work(chosen=2 * shape.weights, pointwise=sums)
    return {"dsnot": seen, "dsnot: last masks": shape.masked(tokens)}


def _least_squares(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """As many passes with Gram matrices as swaps, the iterations, and every set of new values measured."""
    iterations = config.reconstruct.iterations
    solved = Work(
        forward=2 * iterations * sum(out * width**2 for out, width in shape.linears),
        weights=CONJUGATE * iterations * shape.weights,
    )
    passes = 2 * min(len(shape.linears), 2)
    grams = shape.grams(tokens) + _first_sample(shape, tokens)
    return {"least squares": shape.masked(tokens) * passes + grams + solved}


def _adam(shape: BlockShape, tokens: Tokens, config: BarberConfig) -> dict[str, Work]:
    """Every pass that it may take over the samples that are not held out, and the held-out ones measured."""
    held = len(range(0, tokens.samples, HELD_OUT)) / tokens.samples
    passes, learned = config.reconstruct.passes, 1 - held if tokens.samples > 1 else 1.0
    steps = passes * learned * tokens.samples
    trained = shape.gradient(tokens) * (passes * learned) + shape.forward(tokens) * (held * (passes + 1))
    return {"gradient steps": trained + shape.masked(tokens) + Work(weights=ADAM * steps * shape.weights)}


Count = Callable[[BlockShape, Tokens, BarberConfig], Mapping[str, Work]]
REBUILD: dict[str, Count] = {
    "barber": _barber, "swaps": _swaps, "swaps+gauss-newton": _inner_swaps, "dsnot": _dsnot,
    "gauss-newton": _gauss_newton,
}  # fmt: skip
RECONSTRUCT: dict[str, Count] = {"least-squares": _least_squares, "gradient": _adam}


def seconds_of(found: Mapping[str, Work | None], rates: Work) -> dict[str, float | None]:
    """How long every stage takes at these rates; None where its work is unknown."""
    return {name: None if work is None else work.seconds(rates) for name, work in found.items()}


def table(seconds: Mapping[str, float | None]) -> list[str]:
    """The stages' seconds, for people."""
    known = sum(value for value in seconds.values() if value is not None)
    least = ", and what plug-ins take" if None in seconds.values() else ""
    lines = [f"time          about {spell(known)}{least}, with nothing beside it on this machine"]
    return lines + [f"  {name:<26}{'?' if value is None else f'{value:,.1f}':>10} s" for name, value in seconds.items()]


def spell(seconds: float) -> str:
    """A time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
