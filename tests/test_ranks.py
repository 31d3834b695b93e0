"""Several ranks: the samples shared, the sums in order, the same masks everywhere, nothing that hangs."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier, MaskFile
from optimum_barber.base.devices import has_float64
from optimum_barber.base.errors import BarberError
from optimum_barber.base.output import partial_of
from optimum_barber.base.ranks import ALONE, RankGroup, Ranks, Share, all_ranks, share_of, tiles
from optimum_barber.checkpoints.names import MASKS_NAME
from optimum_barber.models import device
from optimum_barber.models.activations import Activations
from optimum_barber.models.device import choose_device
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.needs import ACTIVATION_COPIES, Needs
from optimum_barber.prune.plan import make_plan

from . import ranks
from .conftest import tiny_model, tiny_windows
from .test_refine import blocks, random_masks
from .test_streaming import files

CPU = torch.device("cpu")
WINDOWS = tiny_windows(samples=6, length=32)
SETTINGS = [
    {"sparsity": 0.5},
    {"producer": "sparsegpt", "pattern": "2:4", "rebuild": {"method": "swaps"}, "reconstruct": "least-squares"},
    {"sparsity": 0.5, "rebuild": {"method": "swaps+gauss-newton", "newton_rounds": 1}},
    {"producer": "magnitude", "sparsity": 0.6, "allocation": "owl", "rebuild": {"method": "dsnot+barber"}},
]


def parts(count, seed=0):
    """A float32 tensor for every rank, of sizes that make the order of a sum matter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator) * 10.0**rank for rank in range(count)]


def talk(rank, directory, count):
    """Every verb; a rank that finds something else than it should fails."""
    with all_ranks(CPU) as group:
        assert isinstance(group, RankGroup) and (group.index, group.count, group.local) == (rank, count, count)
        expected = parts(count)[0]
        for part in parts(count)[1:]:
            expected = expected + part
        for mine in (parts(count)[rank], parts(count)[rank].t().contiguous().t()):
            assert group.sum(mine) is mine and torch.equal(mine, expected)
        assert group.gather([rank + 0.1] * rank) == [r + 0.1 for r in range(count) for _ in range(r)]
        keep = torch.rand(6, 4, generator=torch.Generator().manual_seed(rank)).t() > 0.5
        assert torch.equal(
            group.broadcast(keep), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).t() > 0.5
        )
        for rows in (1, 7):
            whole = torch.arange(rows * 3).reshape(rows, 3)
            for like in (whole.float(), whole % 2 == 0):
                assert torch.equal(group.spread(lambda some, like=like: like[some].clone(), like), like)
                tiled = group.spread(lambda some, like=like: like[some] if some.start % 3 == 0 else None, like, tile=3)
                assert torch.equal(tiled, like)
        share = group.share(8)
        samples = [torch.full((1, 2), float(index)) for index in range(8)]
        collected = list(group.collect(samples[share.slice], 8))
        assert [int(sample[0, 0]) for sample in collected] == ([*range(8)] if rank == 0 else [])
        group.agree({"a": 1, "b": [2]})
        with pytest.raises(BarberError, match="samples 2 are fewer than the 3 ranks"):
            group.share(2)
        with pytest.raises(BarberError) as caught:
            group.agree({"a": int(rank == 2), "text": "same"})
        ranks.note(directory, rank, str(caught.value))


def test_the_verbs(tmp_path):
    statuses = ranks.start(3, talk, tmp_path, 3)
    assert statuses == [0, 0, 0]
    told = ranks.notes(tmp_path)
    assert told[2] == "ranks must be given the same: rank 2 has a 1, rank 0 0"
    assert all(f"rank {rank} has lost another one" in told[rank] for rank in (0, 1))


def test_one_process_talks_to_nobody():
    with all_ranks(CPU) as alone:
        assert alone is ALONE and alone.first
    tensor = torch.rand(3, 2)
    assert alone.sum(tensor) is tensor and alone.broadcast(tensor) is tensor
    assert alone.gather([1.0, 2.0]) == [1.0, 2.0] and list(alone.collect([tensor], 1)) == [tensor]
    assert alone.share(5) == Share(0, 5, 5)
    alone.agree({"a": 1})
    alone.wait()


@pytest.mark.parametrize(("total", "count"), [(6, 4), (128, 64), (5, 5), (7, 2), (3, 1)])
def test_shares_are_consecutive_and_differ_by_one_at_most(total, count):
    shares = [share_of(total, index, count) for index in range(count)]
    assert [s for share in shares for s in range(total)[share.slice]] == list(range(total))
    sizes = {share.end - share.first for share in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("total", "count", "tile"), [(7, 2, 3), (512, 4, 256), (513, 4, 256), (5, 3, 8)])
def test_shares_of_whole_tiles(total, count, tile):
    shares = [share_of(total, index, count, tile) for index in range(count)]
    result = [some for share in shares for some in tiles(share, tile)]
    assert result == [slice(first, min(first + tile, total)) for first in range(0, total, tile)]


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_every_nth_sample_is_the_same_one_however_they_are_shared(stride):
    result = []
    for index in range(4):
        share = share_of(11, index, 4)
        here = Activations([torch.tensor([s]) for s in range(11)[share.slice]], share=share)
        assert here.total == 11
        result += [int(sample) for sample in here.every(stride)]
    assert result == list(range(0, 11, stride))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, settings):
    """6 samples, so that shares of 2 and 3 ranks are equal and those of 4 and 5 are not."""
    (tmp_path / "1").mkdir()
    ranks.prune_in_memory(0, tmp_path / "1", settings, WINDOWS)
    expected = ranks.notes(tmp_path / "1")
    for count in (2, 3, 4, 5):
        directory = tmp_path / f"{count}"
        directory.mkdir()
        assert ranks.start(count, ranks.prune_in_memory, directory, settings, WINDOWS) == [0] * count
        assert ranks.notes(directory) == expected * count
        assert files(directory / "out") == files(tmp_path / "1" / "out")


def statistics(rank, directory):
    """The statistics of the first layer's inputs, as a producer sees them."""
    seen = {}

    def producer(linear):
        seen.update({f"{linear.name}.{key}": value for key, value in vars(linear.statistics).items()})
        return linear.weight.abs() >= linear.weight.abs().flatten().kthvalue(linear.weight.numel() // 2 + 1).values

    producer.needs = ("input_norm", "gram", "input_abs", "input_sum")
    config = BarberConfig(producer=producer, sparsity=0.5, rebuild="none")
    BarberSparsifier(tiny_model(num_hidden_layers=1)).sparsify(config, WINDOWS, quiet=True)
    ranks.note(directory, rank, {key: torch.as_tensor(value).tolist() for key, value in seen.items()})


@pytest.mark.parametrize("count", [2, 4])
def test_the_statistics_of_the_first_layer(tmp_path, count):
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
    statistics(0, tmp_path / "one")
    statuses = ranks.start(count, statistics, tmp_path / "several")
    assert statuses == [0] * count
    several, one = ranks.notes(tmp_path / "several"), ranks.notes(tmp_path / "one")[0]
    assert all(other == several[0] for other in several)
    attention = [key for key in one if ".self_attn." in key and ".o_proj." not in key]
    assert len(attention) == 3 * 5
    for key in attention:
        assert several[0][key] == one[key]


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    tiny_model(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(directory, max_shard_size="12KB")
    return directory


def test_a_killed_rank_ends_the_run_and_resume_completes_it(tmp_path, model):
    run = (ranks.stream, tmp_path, model, SETTINGS[0], WINDOWS)
    assert ranks.start(2, *run, "whole") == [0, 0]
    assert ranks.notes(tmp_path)[0] == ranks.notes(tmp_path)[1]
    assert not partial_of(tmp_path / "whole").exists()
    assert ranks.start(2, *run, "out", (1, 4)) == [1, -9]
    assert time.monotonic() - float((tmp_path / "killed").read_text()) < 60
    assert "LostRankError: rank 0 has lost another one, which has ended" in ranks.notes(tmp_path)[0]
    assert not (tmp_path / "out").exists() and partial_of(tmp_path / "out").exists()
    shutil.copytree(partial_of(tmp_path / "out"), partial_of(tmp_path / "other"))
    assert ranks.start(2, *run, "out", resume=True) == [0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    ranks.stream(0, *run[1:], "other", resume=True)
    assert files(tmp_path / "other") == files(tmp_path / "whole")


def test_from_disk_to_disk_as_in_memory(tmp_path, model):
    run = (tmp_path, model, SETTINGS[1], WINDOWS, "out")
    assert ranks.start(3, ranks.stream, *run, activations="disk") == [0, 0, 0]
    streamed = ranks.notes(tmp_path)
    assert all(other == streamed[0] for other in streamed)
    assert ranks.start(3, ranks.prune_checkpoint, tmp_path, model, SETTINGS[1], WINDOWS) == [0, 0, 0]
    assert ranks.notes(tmp_path) == streamed


@pytest.mark.parametrize(("setting", "chain"), [("reconstruct", "least-squares+gradient"), ("rebuild", "swaps+besa")])
def test_what_several_ranks_cannot_do(setting, chain):
    class Two(Ranks):
        count = 2

    source = ModelSource(tiny_model(num_hidden_layers=1))
    config = BarberConfig(sparsity=0.5, **{setting: chain})
    with pytest.raises(BarberError, match=f"{setting} '{chain.rpartition('+')[2]}' steps from sample to sample"):
        make_plan(config, source, Two())
    assert make_plan(config, source).ranks is ALONE


def test_what_each_of_several_ranks_takes():
    alone = Needs(layer=10, gram=0, window=7, window_outputs=0, windows=5, checkpoint=1)
    shared = Needs(layer=10, gram=0, window=7, window_outputs=0, windows=5, checkpoint=1, ranks=2)
    assert alone.memory - shared.memory == ACTIVATION_COPIES * 2 * 7
    assert alone.disk == shared.disk
    assert "for each of 2 ranks" in shared.lines()[0]


def test_the_gpu_of_a_process_is_that_of_its_number(monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(device, "accelerator_count", lambda: 2)
    monkeypatch.setattr(device, "has_float64", lambda kind: kind.type == "cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BarberError, match="no GPU for process 2 of this machine, which has 2: start 2 processes"):
        choose_device("auto")


def test_an_accelerator_without_float64_is_refused_before_any_work(monkeypatch):
    def to_float64(tensor, *arguments):
        raise TypeError("no float64")

    def busy(tensor, *arguments):
        raise RuntimeError("the device is busy")

    assert has_float64(CPU)
    monkeypatch.setattr(torch.Tensor, "to", to_float64)
    assert not has_float64(CPU)
    monkeypatch.setattr(torch.Tensor, "to", busy)
    with pytest.raises(RuntimeError, match="busy"):
        has_float64(CPU)
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(device, "has_float64", lambda kind: False)
    assert choose_device("auto") == CPU and choose_device("cpu") == CPU
    with pytest.raises(BarberError, match="device 'cpu' has no float64, in which samples are summed: give cpu"):
        BarberSparsifier(tiny_model()).sparsify(BarberConfig(sparsity=0.5, device="cpu"), WINDOWS)


def test_a_rank_without_a_window_that_measures(tmp_path):
    refine = (ranks.refine, tmp_path, random_masks(blocks(tiny_model())), tiny_windows(6))
    ranks.refine(0, *refine[1:])
    (alone,) = ranks.notes(tmp_path)
    assert sum(record["swaps"] for record in alone["looks"]) > 0
    assert ranks.start(3, *refine) == [0, 0, 0]
    assert ranks.notes(tmp_path) == [alone] * 3


def run_command(tmp_path, *arguments, count=2, late=None):
    """Statuses, and all that was written to standard error and standard output."""
    statuses = ranks.start(count, ranks.command, ranks.free_port(), tmp_path, [str(a) for a in arguments], late=late)
    return statuses, *("".join((tmp_path / f"{n}-{r}").read_text() for r in range(count)) for n in ("stderr", "stdout"))


@pytest.mark.parametrize("late", [None, 0, 1])
def test_bad_input_is_told_once_with_status_2(late, tmp_path, model_dir, text_file):
    prune = ("prune", model_dir, "--calibration", text_file, "--sequence-length", 16, "-o", tmp_path / "out")
    for options, complaint in (
        ((*prune, "--sparsity", 0.5, "--samples", 1), "samples 1 are fewer than the 2 ranks: give more"),
        ((*prune, "--sparsity", 1.5), "sparsity 1.5"),
        (("inspect", model_dir), "inspect works in one process"),
        ((*prune, "--sparsty", 0.5), "unrecognized arguments"),
    ):
        statuses, told, printed = run_command(tmp_path, *options, late=late)
        assert statuses == [2, 2] and printed == ""
        assert told.count(complaint) == 1 and told.count("optimum-barber: ") == 1
        assert not list(tmp_path.glob("out*"))


def test_under_torchrun(tmp_path, model_dir, text_file):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    arguments = ["prune", model_dir, "--sparsity", "0.5", "--calibration", text_file, "--samples", "3"]
    command = [*launcher, ranks.free_port(), "-m", "optimum_barber", *arguments, "--sequence-length", "16"]
    done = subprocess.run(
        [str(a) for a in [*command, "-o", tmp_path / "out"]], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert len(MaskFile(tmp_path / "out" / MASKS_NAME)) == 14
