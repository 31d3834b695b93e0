"""Precision of float32 matrix products: what `auto` is on which device, and what each rounds."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as tiny_class
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base import devices
from optimum_barber.base.devices import fast_precision
from optimum_barber.base.errors import BarberError
from optimum_barber.models import device as device_module
from optimum_barber.models.device import matrix_products, product_precision
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.plan import precision_for
from optimum_barber.runs import fingerprint
from optimum_barber.runs.compare.plan import plan_of
from optimum_barber.runs.compare.settings import CompareSettings

from .conftest import tiny_model, tiny_windows

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MASKS = {
    "causal": {"is_causal": True},
    "none": {},
    "bool": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()},
    "float": {"attn_mask": torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)},
}


def on_cpu(monkeypatch, capabilities, cap=None):
    """The precision of a CPU that tells these capabilities, of which oneDNN may use those below `cap`."""
    for name in devices.ONEDNN_CAPS:
        monkeypatch.delenv(name, raising=False)
    if cap is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    return fast_precision(CPU)


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16"])
def test_a_cpu_with_bfloat16_units_rounds_to_bfloat16(monkeypatch, unit):
    assert on_cpu(monkeypatch, {unit: True}) == "medium"
    assert on_cpu(monkeypatch, {unit: False, "avx2": True}) == "highest"
    assert on_cpu(monkeypatch, {}) == "highest"


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        ("ALL", "medium"),
        ("default", "medium"),
        ("AVX512_CORE_AMX", "medium"),
        ("avx512_core_bf16", "medium"),
        ("AVX512_CORE", "highest"),
        ("AVX512_CORE_VNNI", "highest"),
        ("AVX2", "highest"),
    ],
)
def test_units_that_onednn_may_not_use_do_not_count(monkeypatch, cap, expected):
    assert on_cpu(monkeypatch, {"amx_bf16": True}, cap) == expected


def test_a_cpu_whose_capabilities_torch_does_not_tell_is_exact(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision(CPU) == "highest"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "high"), ((8, 0), "high"), ((7, 5), "highest")])
def test_a_gpu_with_tf32_units_rounds_to_tf32(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_precision(CUDA) == expected
    monkeypatch.setattr(torch.version, "hip", "6.2")  # AMD numbers its GPUs otherwise
    assert fast_precision(CUDA) == "highest"


def attention(q, k, v, attn_mask=None, is_causal=False):
    """softmax(q k^T / sqrt(d)) v in the dtype of its arguments."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", [(8, 8), (8, 4)], ids=["same", "narrow values"])
def test_attention_is_rounded_at_medium_alone(mask, widths):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 6, widths[0]), (2, 3, 6, widths[0]), (2, 3, 6, widths[1])]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    exact = attention(q.double(), k.double(), v.double(), **MASKS[mask])
    errors = {}
    for precision in ("highest", "high", "medium"):
        with matrix_products(precision):
            output = functional.scaled_dot_product_attention(q, k, v, **MASKS[mask])
        assert output.dtype == torch.float32
        errors[precision] = float((output - exact).norm() / exact.norm())
    assert errors["highest"] == errors["high"] < 1e-6 < 1e-4 < errors["medium"] < 1e-2


def test_rounded_attention_has_gradients_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator).requires_grad_() for _ in range(3))
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    attention(*exact, is_causal=True).square().sum().backward()
    with matrix_products("medium"):
        functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()
    for tensor, reference in zip((q, k, v), exact, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - reference.grad).norm() < 2e-2 * reference.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_of_other_dtypes_is_left_alone(dtype):
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = functional.scaled_dot_product_attention(q, k, v)
    with matrix_products("medium"):
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matrix_products_are_as_precise_as_asked_for_while_a_run_lasts(precision):
    seen = set()

    def producer(linear):
        seen.add(torch.get_float32_matmul_precision())
        return linear.weight.abs() > linear.weight.abs().median(1, keepdim=True).values

    before = torch.get_float32_matmul_precision()
    config = BarberConfig(producer=producer, sparsity=0.5, rebuild="none", precision=precision)
    BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), quiet=True)
    assert seen == {precision}
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), matrix_products(precision):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_an_unknown_precision_is_answered_with_the_legal_ones():
    with pytest.raises(ValueError, match="unknown precision 'half': known are auto, high, highest, medium"):
        BarberConfig(sparsity=0.5, precision="half")


@pytest.fixture
def units(monkeypatch):
    """Sets which precision the device has units for."""

    def of(precision):
        for module in (device_module, fingerprint):
            monkeypatch.setattr(module, "fast_precision", lambda device: precision)

    return of


@pytest.mark.parametrize("stream", ["never", "always"])
def test_the_record_states_what_auto_was(tmp_path, model_dir, units, stream):
    units("medium")
    sparsifier = BarberSparsifier.from_pretrained(str(model_dir), stream=stream)
    sparsifier.sparsify(BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "barber_config.json").read_text())["precision"] == "medium"


def test_the_same_precision_has_the_same_bits_whether_it_was_chosen_or_asked_for(units):
    units("medium")
    hashes = []
    for precision in ("auto", "medium", "auto"):
        config = BarberConfig(sparsity=0.5, precision=precision)
        result = BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), quiet=True)
        hashes.append({name: mask.sha256 for name, mask in result.masks.items()})
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_run_is_not_resumed_where_auto_is_something_else(tmp_path, model_dir, units):
    class StoppedError(Exception):
        pass

    def stop(report):
        if report.block.endswith("1.attention"):
            raise StoppedError

    def sparsify(**options):
        sparsifier = BarberSparsifier.from_pretrained(str(model_dir), stream="always")
        sparsifier.sparsify(
            BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / "out", resume=True, quiet=True, **options
        )

    units("medium")
    with pytest.raises(StoppedError):
        sparsify(callbacks=[stop])
    units("highest")
    with pytest.raises(BarberError, match="with other settings: precision was medium, is highest"):
        sparsify()


def test_auto_is_float32_on_a_cpu_for_models_whose_experts_get_the_tokens(units):
    units("medium")
    config = BarberConfig(sparsity=0.5)
    experts = ModelSource(tiny_class(tiny_config("mixtral")))
    assert precision_for(config, ModelSource(tiny_model())) == "medium"
    assert precision_for(config, experts) == "highest"
    assert precision_for(BarberConfig(sparsity=0.5, precision="medium"), experts) == "medium"
    assert product_precision("auto", CUDA, routed=True) == "medium"


def test_a_cell_made_with_other_products_is_another_cell(model_dir, tmp_path, units):
    settings = CompareSettings(producers=["wanda"], rebuilds=["none"], sparsities=[0.5], evaluation="pydoc")

    def of_cell(**chosen):
        base = BarberConfig(calibration=["pydoc"], device="cpu", **chosen)
        return plan_of(str(model_dir), tmp_path / "out", settings, base).fingerprints["wanda_none_0.5"]

    digests = {}
    for precision in ("medium", "highest"):
        units(precision)
        digests[precision] = of_cell()
        digests[f"asked for, on {precision}"] = of_cell(precision="medium")
    assert len({*digests.values()}) == 3
    assert digests["asked for, on medium"] == digests["asked for, on highest"]


UNCAPPED = """
import sys, torch
from optimum_barber.base.devices import fast_precision
from optimum_barber.cli import main
precision = fast_precision(torch.device("cpu"))
sys.stdout.write(precision)
if precision != "highest":
    for output in sys.argv[2:]:
        command = ["prune", sys.argv[1], "--calibration", "pydoc", "--sparsity", "0.5", "--samples", "4"]
        assert main([*command, "--sequence-length", "16", "--quiet", "--output", output]) == 0
"""


def test_the_command_uses_the_units_of_this_machine(tmp_path, model_dir):
    environment = {name: value for name, value in os.environ.items() if name not in devices.ONEDNN_CAPS}
    outputs = [tmp_path / "one", tmp_path / "two"]
    command = [sys.executable, "-c", UNCAPPED, *map(str, [model_dir, *outputs])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if done.stdout == "highest":
        pytest.skip("this CPU has no units for bfloat16 products")
    masks = []
    for output in outputs:
        assert json.loads((output / "barber_config.json").read_text())["precision"] == done.stdout
        masks.append((output / "sparsity_masks.safetensors").read_bytes())
    assert masks[0] == masks[1]
