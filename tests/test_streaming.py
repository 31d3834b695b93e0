"""From disk to disk: the same bits as in memory, a layer at a time, resumed after any stop."""

import errno
import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError, UnfinishedError
from optimum_barber.base.memory import WEIGHT_SIZED
from optimum_barber.base.output import partial_of, staged, unfinished
from optimum_barber.checkpoints.shards import OutputShards, read_header
from optimum_barber.models.loading import resolve_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.streaming.disk import DiskCheckpoint, DiskSource, returned_size
from optimum_barber.prune.streaming.progress import Progress

from .conftest import tiny_model, tiny_windows
from .killer import killed

QUICK = BarberConfig(sparsity=0.5, rebuild={"rounds": 2})


def stored(tmp_path, family="llama", dtype=torch.float32, shard="50GB", **changes):
    """A tiny checkpoint and what streams it."""
    directory = tmp_path / "model"
    tiny_model(family, **changes).to(dtype).save_pretrained(directory, max_shard_size=shard)
    return opened(directory)


def opened(directory):
    """What streams a checkpoint without a tokenizer."""
    return BarberSparsifier(None, None, resolve_model(str(directory)), stream="always")


def in_memory(tmp_path, config=QUICK, **how):
    reference = resolve_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(reference.directory)
    return BarberSparsifier(model, None, reference).sparsify(
        config, tiny_windows(6), save_dir=tmp_path / "memory", quiet=True, **how
    )


def stream(streaming, output, config=QUICK, **how):
    return streaming.sparsify(config, tiny_windows(6), save_dir=output, quiet=True, **how)


def tensors(directory):
    """All weights of a checkpoint."""
    return {n: t for path in sorted(directory.glob("model*.safetensors")) for n, t in load_file(path).items()}


def files(directory):
    """All files, without what a clock writes."""
    actual = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = json.loads(actual.pop("report.json"))
    for part in (report, *report["blocks"]):
        part.pop("seconds"), part.pop("peak_memory")
    return actual, report


CASES = [
    ("llama", torch.float32, "50GB", {}),
    ("llama-bias-untied", torch.bfloat16, "12KB", {}),
    ("llama", torch.float16, "12KB", {"tie_word_embeddings": True}),
    ("opt", torch.bfloat16, "12KB", {}),
    ("gemma2", torch.bfloat16, "50GB", {}),
    ("phi3", torch.float32, "20KB", {}),
]


@pytest.mark.parametrize(("family", "dtype", "shard", "changes"), CASES, ids=str)
def test_the_same_bits_as_in_memory(tmp_path, family, dtype, shard, changes):
    streaming = stored(tmp_path, family, dtype, shard, **changes)
    expected = in_memory(tmp_path)
    for place in ("memory", "disk"):
        result = stream(streaming, tmp_path / "disk", activations=place, overwrite=True)
        assert {n: m.sha256 for n, m in result.masks.items()} == {n: m.sha256 for n, m in expected.masks.items()}
        assert result.sparsity_config == expected.sparsity_config
        ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == theirs[n].dtype == dtype and torch.equal(ours[n], theirs[n]) for n in ours)
    names = {path.name for path in (tmp_path / "disk").iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} <= names
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "disk").dtype == dtype


def test_one_file_is_the_same_to_the_byte(tmp_path):
    streaming = stored(tmp_path, dtype=torch.bfloat16)
    in_memory(tmp_path)
    stream(streaming, tmp_path / "disk")
    assert files(tmp_path / "disk") == files(tmp_path / "memory")
    assert not partial_of(tmp_path / "disk").exists()


@pytest.mark.parametrize("producer", ["sparsegpt", "magnitude"])
def test_another_dtype_and_changed_weights(tmp_path, producer):
    streaming = stored(tmp_path)
    config = BarberConfig(producer=producer, pattern="2:4", dtype="bfloat16", ignore=["*.1.mlp.*"])
    in_memory(tmp_path, config)
    stream(streaming, tmp_path / "disk", config)
    ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
    assert all(ours[n].dtype == torch.bfloat16 and torch.equal(ours[n], theirs[n]) for n in theirs)


def test_tensors_that_the_model_does_not_know_and_the_source_stay_as_they_are(tmp_path):
    from safetensors.torch import save_file

    stored(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "extra": torch.arange(5)}, path, {"format": "pt"})
    before = path.read_bytes()
    stream(opened(tmp_path / "model"), tmp_path / "disk")
    assert torch.equal(tensors(tmp_path / "disk")["extra"], torch.arange(5))
    assert path.read_bytes() == before


def test_only_one_layer_ever_has_weights(tmp_path):
    checkpoint = DiskCheckpoint.open(stored(tmp_path, num_hidden_layers=4).reference)
    source = DiskSource(checkpoint, torch.device("cpu"))
    for hidden in source.begin(tiny_windows(2)):
        assert hidden.dtype == torch.float32
    for layer in source.layers():
        held = [n for n, p in source.model.named_parameters() if not p.is_meta]
        assert held and all(name.startswith(layer.name + ".") for name in held)
    assert all(p.is_meta for p in source.model.parameters())


@pytest.fixture
def model_loads(monkeypatch):
    """The directories that whole models were loaded from."""
    from optimum_barber.prune import sparsifier

    loads, load = [], sparsifier.load_model
    monkeypatch.setattr(sparsifier, "load_model", lambda r, dtype: loads.append(r.directory) or load(r, dtype))
    return loads


def test_python_streams_where_the_result_is_written_and_loads_where_it_is_not(tmp_path, model_dir, model_loads):
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    streamed_result = sparsifier.sparsify(QUICK, tiny_windows(6), tmp_path / "out", quiet=True)
    assert model_loads == []
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in sparsifier.model.state_dict().items())
    assert model_loads == [tmp_path / "out"]
    loaded = BarberSparsifier.from_pretrained(model_dir)
    result = loaded.sparsify(QUICK, tiny_windows(6), quiet=True)
    assert model_loads[1:] == [model_dir]
    assert {n: m.sha256 for n, m in result.masks.items()} == {n: m.sha256 for n, m in streamed_result.masks.items()}
    assert all(torch.equal(tensor, written[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_model_that_was_loaded_is_pruned_in_memory(tmp_path, model_dir, model_loads):
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    model = sparsifier.model
    sparsifier.sparsify(QUICK, tiny_windows(6), tmp_path / "out", quiet=True)
    assert model_loads == [model_dir] and sparsifier.model is model
    written = tensors(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in written.items())


def test_what_needs_streaming_is_refused_with_the_reason(tmp_path, model_dir):
    in_memory = BarberSparsifier(tiny_model())
    never = BarberSparsifier.from_pretrained(model_dir, stream="never")
    for sparsifier, reason in ((in_memory, "LlamaForCausalLM: it is in memory$"), (never, "model.*: --stream never$")):
        for flag, named in (("--resume", {"resume": True}), ("--activations disk", {"activations": "disk"})):
            with pytest.raises(BarberError, match=f"^{flag} needs streaming, which is not to be had for .*{reason}"):
                sparsifier.sparsify(QUICK, tiny_windows(), tmp_path / "out", quiet=True, **named)
        with pytest.raises(BarberError, match=f"^--dry-run needs streaming, which is not to be had for .*{reason}"):
            sparsifier.preview(QUICK, tmp_path / "out")
    with pytest.raises(BarberError, match="streaming writes as it goes: save_dir is missing"):
        BarberSparsifier.from_pretrained(model_dir, stream="always").sparsify(QUICK, tiny_windows())
    with pytest.raises(BarberError, match="stream 'sometimes' is not legal: auto, always, never"):
        BarberSparsifier.from_pretrained(model_dir, stream="sometimes")


def test_the_streaming_sparsifier_of_0_1_0_is_answered_by_the_new_spelling():
    answer = r"^BarberSparsifier.stream is from_pretrained\(MODEL, stream='always'\) since 0.2.0$"
    with pytest.raises(BarberError, match=answer):
        BarberSparsifier.stream("MODEL", dtype="float16")


class Stop(BaseException):
    """As a kill would: nobody catches it."""


def stopped(streaming, output, after, config=QUICK, error=Stop, **how):
    """A run that ends after so many blocks."""
    left = [after]

    def count(_):
        left[0] -= 1
        if left[0] == 0:
            raise error

    with pytest.raises(error):
        stream(streaming, output, config, callbacks=[count], **how)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_stopped_run_goes_on_to_the_same_files(tmp_path, after, place):
    streaming = stored(tmp_path, dtype=torch.bfloat16, shard="12KB", num_hidden_layers=3)
    stream(streaming, tmp_path / "whole")
    output = tmp_path / "out"
    output.mkdir()
    (output / "before").touch()
    stopped(streaming, output, after, overwrite=True, activations=place)
    assert [path.name for path in output.iterdir()] == ["before"]
    assert unfinished(partial_of(output)) == (after > 2)
    stream(streaming, output, replace_batch(QUICK), overwrite=True, resume=True, activations=place)
    actual, report = files(output)
    expected, expected_report = files(tmp_path / "whole")
    assert report == expected_report
    assert {n: c for n, c in actual.items() if n != "barber_config.json"} == {
        n: c for n, c in expected.items() if n != "barber_config.json"
    }
    assert not partial_of(output).exists()


def replace_batch(config):
    """The same settings with another batch size, which changes no result."""
    return config.model_copy(update={"batch_size": 2})


def test_a_stopped_run_is_neither_lost_nor_taken_up_unasked(tmp_path):
    streaming = stored(tmp_path)
    stopped(streaming, tmp_path / "out", 3)
    shard, changed = tmp_path / "out.partial" / "model.safetensors", BarberConfig(sparsity=0.5, dtype="bfloat16")
    before = shard.read_bytes()
    with pytest.raises(BarberError, match="dtype was auto, is bfloat16"):
        stream(opened(tmp_path / "model"), tmp_path / "out", changed, resume=True)
    assert shard.read_bytes() == before
    with pytest.raises(BarberError, match="an unfinished run lies in .*out.partial: --resume goes on with it"):
        stream(streaming, tmp_path / "out")
    with pytest.raises(BarberError, match=r"resume is not possible with other settings: sparsity was 0.5, is 0.6$"):
        stream(streaming, tmp_path / "out", BarberConfig(sparsity=0.6, rebuild={"rounds": 2}), resume=True)
    with pytest.raises(BarberError, match="rounds was 2, is 3$"):
        stream(streaming, tmp_path / "out", BarberConfig(sparsity=0.5, rebuild={"rounds": 3}), resume=True)
    with pytest.raises(BarberError, match="calibration tokens was"):
        streaming.sparsify(QUICK, tiny_windows(6, seed=1), save_dir=tmp_path / "out", quiet=True, resume=True)
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 0))
    with pytest.raises(BarberError, match="input .*model was"):
        stream(streaming, tmp_path / "out", resume=True)
    assert unfinished(partial_of(tmp_path / "out"))
    stream(streaming, tmp_path / "out", overwrite=True)
    assert not partial_of(tmp_path / "out").exists()


def test_a_run_in_a_directory_that_is_removed_with_it_is_not_said_to_be_resumable(tmp_path, caplog):
    streaming = stored(tmp_path)
    with pytest.raises(Stop), staged(tmp_path / "stage") as stage:
        stream(streaming, stage / "model", callbacks=[stop_in_the_last_layer])
    assert "--resume" not in caplog.text
    with pytest.raises(UnfinishedError, match="model.partial; nothing was kept$"), staged(tmp_path / "stage") as stage:
        stream(streaming, stage / "model", callbacks=[no_room_in_the_last_layer])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(Stop):
        stream(streaming, tmp_path / "out", callbacks=[stop_in_the_last_layer])
    assert "go on with --resume" in caplog.text


def stop_in_the_last_layer(report):
    if report.block.startswith("model.layers.1"):
        raise Stop


def no_room_in_the_last_layer(report):
    if report.block.startswith("model.layers.1"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_damaged_state_is_refused(tmp_path):
    streaming = stored(tmp_path)
    stopped(streaming, tmp_path / "out", 3)
    hidden = next((tmp_path / "out.partial" / ".resume").glob("hidden*"))
    hidden.write_bytes(hidden.read_bytes()[:-4])
    with pytest.raises(BarberError, match=r"resume is not possible: hidden-00001.safetensors is truncated"):
        stream(streaming, tmp_path / "out", resume=True)


def flip(path, name):
    """Change one bit of a tensor where it lies."""
    header = read_header(path)
    content = bytearray(path.read_bytes())
    content[header.starts[name] + header.entries[name].bytes // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["weight", "hidden"])
def test_a_bit_that_changed_meanwhile_is_found(tmp_path, what):
    streaming = stored(tmp_path)
    stopped(streaming, tmp_path / "out", 3)
    partial = tmp_path / "out.partial"
    file, name = (
        ("model.safetensors", "model.layers.0.mlp.up_proj.weight")
        if what == "weight"
        else (".resume/hidden-00001.safetensors", "00000003")
    )
    flip(partial / file, name)
    with pytest.raises(
        BarberError, match=rf"resume is not possible: {file} does not hold {name} as it was written; st"
    ):
        stream(streaming, tmp_path / "out", resume=True)
    flip(partial / file, name)
    stream(streaming, tmp_path / "out", resume=True)


def test_a_bit_that_changes_before_the_end_is_found(tmp_path):
    streaming = stored(tmp_path)
    shard, name = tmp_path / "out.partial" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    later = [lambda report: flip(shard, name) if report.block == "model.layers.1.mlp" else None]
    with pytest.raises(BarberError, match=f"model.safetensors does not hold {name} as it was written"):
        stream(streaming, tmp_path / "out", callbacks=later)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class BadInputError(BarberError):
    def __init__(self):
        super().__init__("bad input")


def test_bad_input_in_a_later_layer_leaves_nothing(tmp_path):
    streaming = stored(tmp_path)
    stopped(streaming, tmp_path / "out", 3, error=BadInputError)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("where", [Progress, OutputShards])
def test_a_full_disk_keeps_the_layers_before(tmp_path, monkeypatch, where):
    streaming = stored(tmp_path, num_hidden_layers=3)
    stream(streaming, tmp_path / "whole")
    name = "commit" if where is Progress else "write"
    calls, method = [0], getattr(where, name)

    def full(self, *args):
        calls[0] += 1
        if calls[0] > (1 if where is Progress else 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        with pytest.raises(UnfinishedError, match="no space is left for .*out.partial; make room and go on"):
            stream(streaming, tmp_path / "out")
    stream(streaming, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_disk_that_is_full_at_once_keeps_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnfinishedError, match="nothing was kept"):
        stream(stored(tmp_path), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_at_random_moments_it_ends_with_the_same_files(tmp_path, tokenizer, text_file):
    stored(tmp_path, num_hidden_layers=5)
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--calibration", text_file, "--samples", "4", "--sequence-length", "32", "--resume", "--quiet"]
    said = killed(tmp_path, 8, "prune", tmp_path / "model", "--sparsity", "0.5", *flags, "-o", tmp_path / "OUT")
    assert any("out.partial/.resume/state.json" in line for line in said)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_freed_experts_go_back_to_the_system_as_larger_matrices_do(tmp_path):
    experts = transformers.Qwen3MoeConfig(
        vocab_size=99, hidden_size=512, moe_intermediate_size=288, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    source = ModelSource(transformers.Qwen3MoeForCausalLM(experts))
    assert returned_size(source) == 512 * 288
    assert returned_size(ModelSource(tiny_model())) == WEIGHT_SIZED


class CallsBeside(transformers.LlamaModel):
    """A decoder that sends its embeddings through a part of the wrapper around it."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=inputs_embeds + self.beside[0](inputs_embeds), **kwargs)


def calling_beside(monkeypatch):
    """LLaMA with such a part, `beside`, that the files hold."""
    own = transformers.LlamaForCausalLM.__init__

    def init(self, config):
        own(self, config)
        self.beside = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.model.__class__ = CallsBeside
        self.model.__dict__["beside"] = [self.beside]  # in no list of modules

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", init)


def test_what_text_calls_outside_of_the_decoder_is_read_when_it_is_called(tmp_path, monkeypatch):
    calling_beside(monkeypatch)
    torch.manual_seed(0)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    stream(opened(tmp_path / "model"), tmp_path / "whole")
    in_memory(tmp_path)
    assert files(tmp_path / "whole") == files(tmp_path / "memory")


def test_weights_that_are_used_without_a_call_are_told(tmp_path, monkeypatch):
    calling_beside(monkeypatch)
    tiny_model("llama").save_pretrained(tmp_path / "model")

    def add(self, input_ids=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids) @ self.beside[0].weight.to("cpu")
        return super(CallsBeside, self).forward(inputs_embeds=embedded, **kwargs)

    monkeypatch.setattr(CallsBeside, "forward", add)
    with pytest.raises(BarberError, match="computes with weights that are not read for text: .*; --stream never"):
        stream(opened(tmp_path / "model"), tmp_path / "out")
