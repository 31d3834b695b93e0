"""The house keeps its shape: few rooms, imports in one direction, no circle, plain statements."""

import ast

import pytest

from .house import FOLDERS, PACKAGE, ROOT, circles, complexity, functions, imports, modules, nested

# From top to bottom: a room imports only what stands below it. The root's `__init__` names its public API lazily.
ROOMS = [
    f"{PACKAGE}.integrations.optimum_cli",
    f"{PACKAGE}.cli",
    f"{PACKAGE}.integrations.lm_eval",
    f"{PACKAGE}.runs",
    f"{PACKAGE}.integrations.quantization",
    f"{PACKAGE}.integrations.lora",
    f"{PACKAGE}.integrations.training",
    f"{PACKAGE}.shrink",
    f"{PACKAGE}.prune",
    f"{PACKAGE}.text",
    f"{PACKAGE}.checkpoints",
    f"{PACKAGE}.models",
    f"{PACKAGE}.tensors",
    f"{PACKAGE}.base",
]
OUTSIDE = {PACKAGE, f"{PACKAGE}.__main__", f"{PACKAGE}.integrations"}
MODULES = modules()
GRAPH = {name: imports(module, set(MODULES)) for name, module in MODULES.items() if name not in OUTSIDE}


def room_of(module):
    rooms = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    assert rooms, f"{module} stands in no room"
    return rooms[0]


def test_the_package_holds_rooms_and_nothing_else():
    entries = {path.name for path in FOLDERS[PACKAGE].iterdir()} - {"__pycache__"}
    rooms = {room.split(".")[1] for room in ROOMS} - {"integrations"}
    assert entries == rooms | {"__init__.py", "__main__.py", "py.typed"}
    assert len(entries) <= 12


def test_no_import_points_up():
    up = []
    for module, targets in GRAPH.items():
        for target in targets - OUTSIDE:
            if ROOMS.index(room_of(target)) < ROOMS.index(room_of(module)):
                up.append(f"{module} -> {target}")
    assert not up


def test_nothing_but_the_program_imports_the_root():
    importers = [module for module, targets in GRAPH.items() if targets & OUTSIDE]
    assert not importers


def test_no_imports_go_in_a_circle():
    below = {name: targets - OUTSIDE for name, targets in GRAPH.items()}
    assert not circles(below)


def test_the_test_of_circles_sees_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_tensors_know_torch_alone():
    foreign = []
    for name, module in MODULES.items():
        if not name.startswith(f"{PACKAGE}.tensors"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                foreign += [f"{name} imports {alias.name}" for alias in node.names if alias.name == "transformers"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                foreign.append(f"{name} imports {node.module}")
    assert not foreign


def test_one_module_knows_kinds_of_devices():
    backends = {"cuda", "xpu", "mps", "accelerator", "get_device_module"}
    places = []
    for name, module in MODULES.items():
        for node in ast.walk(module.tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in {*backends, "is_cuda", "is_xpu", "is_mps"}
            if attribute and name != f"{PACKAGE}.base.devices":
                places.append(f"{name}:{node.lineno}")
    assert not places


def test_every_package_is_installed():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = {module.package for module in MODULES.values()} - {f"{PACKAGE}.integrations.optimum_cli"}
    assert packages <= listed


def test_no_statement_nests_comprehensions_ternaries_and_lambdas():
    places = []
    for name, module in MODULES.items():
        places += [f"{name}:{line}" for line in nested(module.tree)]
    assert not places


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_stay_simple(name):
    knotted = [f.name for f in functions(MODULES[name].tree) if complexity(f) > 10]
    assert not knotted


def test_the_loop_over_layers_and_blocks_fits_a_screen():
    loop = next(f for f in functions(MODULES[f"{PACKAGE}.prune.pipeline"].tree) if f.name == "prune")
    assert loop.end_lineno - loop.lineno < 40


def test_nothing_prints_in_the_library():
    calls = []
    for name, module in MODULES.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                calls.append(f"{name}:{node.lineno}")
    assert not calls
