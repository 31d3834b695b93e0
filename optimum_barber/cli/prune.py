"""`optimum-barber prune`: every setting is a field of `BarberConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..prune.rebuild_settings import RebuildConfig
from ..prune.settings import BarberConfig, ReconstructConfig
from .flags import add_fields, add_run, flag_values, shorten_help
from .terminal import hush_loading_bars

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
RECONSTRUCT = "reconstruct_"  # before the fields of ReconstructConfig, in flags and in the namespace
DAILY = (
    "model", "output", "overwrite", "dry_run", "resume", "producer", "sparsity", "pattern", "effort", "method", "texts",
    "samples", "sequence_length", "device",
)  # fmt: skip
MASKS = ("producer", "producer_args", "sparsity", "pattern", "ignore", "allocation", "allocation_args")
REBUILD = ("method", "preset", "error", "accept")
BARBER = ("granularity", "rebuild_ratio", "rounds", "metric", "expansion", "reduction", "pairing")
EXCHANGES = ("swaps", "newton_rounds", "shrinkage")
MACHINE = ("device", "dtype", "precision", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `prune`; the short help has those of daily use."""
    add_run(parser, "where the checkpoint goes")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what the run takes, do nothing")
    masks = parser.add_argument_group("first masks")
    add_fields(masks, BarberConfig, MASKS)
    masks.add_argument("--sparse-model", metavar="DIR", help="checkpoint whose zeros the producer 'existing' reads")
    masks.add_argument("--masks", metavar="FILE", help="mask file that the producer 'masks' reads")
    rebuild = parser.add_argument_group(
        "rebuild", "the defaults proved best on held-out calibration text; they depend on the pattern where it says so"
    )
    add_fields(rebuild, BarberConfig, ("effort",))
    add_fields(rebuild, RebuildConfig, REBUILD)
    add_fields(parser.add_argument_group("rebuilder barber"), RebuildConfig, BARBER)
    add_fields(parser.add_argument_group("rebuilders swaps and gauss-newton"), RebuildConfig, EXCHANGES)
    add_shared(parser)
    _add_streaming(parser)
    shorten_help(parser, DAILY)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Flags of whatever prunes: reconstruction, calibration windows and machine."""
    reconstruct = parser.add_argument_group("reconstruction", "new values for the kept weights, the masks fixed")
    add_fields(reconstruct, ReconstructConfig, prefix=RECONSTRUCT)
    text = parser.add_argument_group("calibration")
    add_fields(text, CalibrationConfig)
    add_fields(text, BarberConfig, ("seed",))
    add_fields(parser.add_argument_group("machine"), BarberConfig, MACHINE)


def _add_streaming(parser: argparse.ArgumentParser) -> None:
    disk = parser.add_argument_group("from disk to disk")
    disk.add_argument("--resume", action="store_true", help="go on with a stopped run for DIR, if there is one")
    disk.add_argument(
        "--stream",
        choices=("auto", "always", "never"),
        default="auto",
        help="hold one decoder layer in memory at a time; auto: wherever the files allow it (default: auto)",
    )
    disk.add_argument(
        "--activations",
        choices=("auto", "memory", "disk"),
        default="auto",
        help="where calibration activations lie while streaming; auto: in memory if they fit (default: auto)",
    )


def config_from(args: argparse.Namespace) -> BarberConfig:
    """The configuration that the flags mean."""
    settings = {**flag_values(args, BarberConfig), **shared_settings(args), "rebuild": flag_values(args, RebuildConfig)}
    _add_masks(args, settings)
    return BarberConfig(**settings)


def shared_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The nested settings of whatever prunes: reconstruction and calibration windows."""
    reconstruct = flag_values(args, ReconstructConfig, RECONSTRUCT)
    return {"reconstruct": reconstruct, "calibration": flag_values(args, CalibrationConfig)}


def _add_masks(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Give a producer that reads masks the argument that the flag for it holds."""
    producer, arguments = settings.get("producer", "wanda"), settings.setdefault("producer_args", {})
    for name, reader in (("sparse_model", "existing"), ("masks", "masks")):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and producer != reader:
            raise BarberError(f"{flag} goes with --producer {reader}, not {producer!r}")
        if value is not None:
            arguments[name] = value
        elif producer == reader and name not in arguments:
            raise BarberError(f"producer {producer!r} needs {flag}")


def run(args: argparse.Namespace) -> int:
    """Prune; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..models.loading import resolve_model
    from ..prune.sparsifier import BarberSparsifier

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
