"""`optimum-barber prune`: every setting is a field of `BarberConfig`, and so is its help."""

import argparse
import sys
from collections.abc import Container
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..base.calibration import FLAT, nested
from ..base.errors import BarberError
from ..prune.rebuild_settings import PRESETS, RebuildConfig
from ..prune.settings import BarberConfig, ReconstructConfig
from .options import add_calibration, number, pairs, whole

HELP = "Prune a model, rebuild its masks, write a checkpoint that loads everywhere."
EPILOG = """\
producers:   magnitude, wanda, sparsegpt, random, existing (--sparse-model), masks (--masks); all of them with
             what they take: optimum-barber plugins
rebuilders:  barber, swaps, gauss-newton, dsnot; chained with +, such as barber+swaps
allocations: uniform, owl, measured, with what they take: optimum-barber plugins

examples:
  optimum-barber prune MODEL --sparsity 0.5 --calibration pydoc --samples 16 --sequence-length 512 -o OUT
  optimum-barber prune MODEL --producer magnitude --pattern 2:4 --calibration text.txt -o OUT
  optimum-barber prune MODEL --producer sparsegpt --producer-arg damping=0.05 --sparsity 0.6 --rebuild none -o OUT
  optimum-barber prune MODEL --sparsity 0.6 --allocation measured --allocation-arg spread=0.05 --calibration c4 -o OUT
  optimum-barber prune MODEL --producer existing --sparse-model OTHER_TOOLS_OUTPUT --calibration pydoc -o OUT
  optimum-barber prune MODEL --sparsity 0.5 --calibration c4 -o OUT --resume     # go on where it was stopped
  torchrun --nproc-per-node 4 -m optimum_barber prune MODEL --sparsity 0.5 --calibration c4 -o OUT
  optimum-barber prune MODEL --sparsity 0.5 --preset published-code --granularity block --calibration c4 -o OUT
"""
FLAGS = {"method": "--rebuild", "reconstruct_method": "--reconstruct"}
HAND_MADE = {
    "producer", "producer_args", "allocation_args", "rebuild", "reconstruct", "calibration", "ignore",
    "pattern", "sparsity",
}  # fmt: skip
RECONSTRUCT = "reconstruct_"  # before the fields of ReconstructConfig in the namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `prune`."""
    parser.add_argument("model", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace what DIR holds, at the very end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what the run takes, do nothing")
    _add_streaming(parser)
    masks = parser.add_argument_group("first masks")
    masks.add_argument(
        "--producer", default="wanda", metavar="NAME", help="what makes the first masks (default: wanda)"
    )
    masks.add_argument("--producer-arg", action="append", default=[], metavar="K=V", help="an argument of the producer")
    masks.add_argument(
        "--sparse-model", metavar="DIR", help="for producer 'existing': the checkpoint whose zeros count"
    )
    masks.add_argument("--masks", metavar="FILE", help="for producer 'masks': the mask file")
    masks.add_argument("--sparsity", type=number, metavar="S", help=field_help(BarberConfig.model_fields["sparsity"]))
    masks.add_argument("--pattern", metavar="N:M", help=field_help(BarberConfig.model_fields["pattern"]))
    masks.add_argument("--ignore", action="append", default=[], metavar="GLOB", help="leave these Linears dense")
    add_allocation(masks)
    rebuild = parser.add_argument_group(
        "rebuild", "the defaults proved best on held-out calibration text; they depend on the pattern where it says so"
    )
    add_fields(rebuild, RebuildConfig)
    reconstruct = parser.add_argument_group("reconstruction", "new values for the kept weights, the masks fixed")
    add_fields(reconstruct, ReconstructConfig, prefix=RECONSTRUCT)
    text = parser.add_argument_group("calibration and machine")
    add_calibration(text)
    add_fields(text, BarberConfig, {*HAND_MADE, "allocation"})


def add_allocation(group: Any) -> None:
    """Flags of how the sparsity is shared out."""
    said = field_help(BarberConfig.model_fields["allocation"])
    group.add_argument("--allocation", default=argparse.SUPPRESS, metavar="NAME", help=said)
    group.add_argument(
        "--allocation-arg", action="append", default=[], metavar="K=V", help="an argument of the allocation"
    )


def _add_streaming(parser: argparse.ArgumentParser) -> None:
    """Flags of a run from disk to disk."""
    disk = parser.add_argument_group("from disk to disk")
    disk.add_argument(
        "--stream",
        choices=("auto", "always", "never"),
        default="auto",
        help="hold one decoder layer in memory at a time; auto: wherever the files allow it (default: auto)",
    )
    disk.add_argument("--resume", action="store_true", help="go on with a stopped run for DIR, if there is one")
    disk.add_argument(
        "--activations",
        choices=("auto", "memory", "disk"),
        default="auto",
        help="where calibration activations lie while streaming; auto: in memory if they fit (default: auto)",
    )


def add_fields(group: Any, model: type[BaseModel], leave: Container[str] = (), prefix: str = "") -> None:
    """A flag for every field; what is not given on the command line stays out of the namespace."""
    for name, field in model.model_fields.items():
        if name not in leave:
            flag = FLAGS.get(prefix + name, "--" + (prefix + name).replace("_", "-"))
            group.add_argument(
                flag,
                dest=prefix + name,
                default=argparse.SUPPRESS,
                metavar=_metavar(field),
                type=field_kind(field),
                help=field_help(field),
            )


def field_kind(field: FieldInfo) -> Any:
    """How a field's value is read from the command line."""
    kinds: dict[Any, Any] = {int: whole, int | None: whole, float: number}
    return kinds.get(field.annotation, str)


def _metavar(field: FieldInfo) -> str:
    return "N" if field_kind(field) is whole else "X"


def field_help(field: FieldInfo) -> str:
    """The field's description, with its default."""
    text = (field.description or "").replace("%", "%%")
    default = field.get_default()
    return text if default is None or "default" in text else f"{text} (default: {default})"


def config_from(args: argparse.Namespace) -> BarberConfig:
    """The configuration that the flags mean."""
    given = vars(args)
    settings = {n: given[n] for n in (*BarberConfig.model_fields, *FLAT) if n in given and n not in HAND_MADE}
    settings = nested({**settings, "calibration": args.calibration})
    rebuild = {n: given[n] for n in RebuildConfig.model_fields if n in given}
    if "preset" in rebuild and rebuild["preset"] not in PRESETS:
        rebuild = {"preset": rebuild["preset"]}
    reconstruct = {n: given[RECONSTRUCT + n] for n in ReconstructConfig.model_fields if RECONSTRUCT + n in given}
    return BarberConfig(
        producer=args.producer,
        producer_args=_producer_arguments(args),
        allocation_args=pairs("allocation-arg", args.allocation_arg, "spread=0.05"),
        sparsity=args.sparsity,
        pattern=args.pattern,
        ignore=args.ignore,
        rebuild=rebuild,  # type: ignore[arg-type]
        reconstruct=reconstruct,  # type: ignore[arg-type]
        **settings,
    )


def _producer_arguments(args: argparse.Namespace) -> dict[str, str]:
    arguments = pairs("producer-arg", args.producer_arg, "damping=0.05")
    for flag, producer in (("sparse_model", "existing"), ("masks", "masks")):
        value = getattr(args, flag)
        if value is not None and args.producer != producer:
            raise BarberError(f"--{flag.replace('_', '-')} goes with --producer {producer}, not {args.producer!r}")
        if value is None and args.producer == producer and flag not in arguments:
            raise BarberError(f"producer {producer!r} needs --{flag.replace('_', '-')}")
        if value is not None:
            arguments[flag] = value
    return arguments


def run(args: argparse.Namespace) -> int:
    """Prune; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..models.loading import resolve_model
    from ..prune.sparsifier import BarberSparsifier
    from . import hush_loading_bars

    hush_loading_bars(args.quiet)
    reference = resolve_model(args.model)
    check_output(args.output, args.overwrite, [reference.path], args.resume)
    sparsifier = BarberSparsifier.from_pretrained(reference, config.dtype, args.stream)
    if args.dry_run:
        sys.stdout.write(sparsifier.preview(config, args.output, args.activations))
        return 0
    result = sparsifier.sparsify(
        config,
        save_dir=args.output,
        overwrite=args.overwrite,
        quiet=args.quiet,
        resume=args.resume,
        activations=args.activations,
    )
    if not args.quiet:
        sys.stdout.write(summary(result.as_report(), args.output))
    return 0


def summary(report: dict[str, Any], output: str) -> str:
    """What a run did, in a few lines."""
    return (
        f"sparsity            {report['sparsity']:.4f}\n"
        f"block error, summed {report['error_before']:.5g} -> {report['error_after']:.5g}\n"
        f"weights swapped     {report['swaps']:,}\n"
        f"seconds             {report['seconds']:.1f}\n"
        f"written to          {output}\n"
    )
