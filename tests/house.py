"""What the structure tests read: the modules of the package, their imports, and how dense their code is."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "optimum_barber"
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.integrations": ROOT / "integrations"}
NESTING = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its path and its tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def modules() -> dict[str, Module]:
    """Every module of the package and of `integrations/`, by dotted name."""
    result = {}
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            result[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return result


def imports(module: Module, names: set[str]) -> set[str]:
    """The modules among `names` that a module imports, inside functions and under TYPE_CHECKING too."""
    targets: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                targets.add(full if full in names else base)
    return (targets & names) - {module.name}


def _base(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of what an import statement imports from."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other by imports, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            start = stack.index(name)
            members = stack[start:]
            del stack[start:]
            if len(members) > 1:
                result.append(sorted(members))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return result


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Every function of a module, methods and inner ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def complexity(function: ast.FunctionDef) -> int:
    """Cyclomatic complexity that counts comprehensions, ternaries, lambdas and and/or as well; inner functions not."""
    total, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        total += _branches(node)
        waiting += ast.iter_child_nodes(node)
    return total


def _branches(node: ast.AST) -> int:
    """How many paths one node adds."""
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    one = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Lambda, ast.match_case)
    return int(isinstance(node, one))


def nested(tree: ast.AST) -> list[int]:
    """Lines on which a comprehension, a ternary or a lambda lies within another one."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, NESTING):
            inner = [below for below in ast.walk(node) if below is not node and isinstance(below, NESTING)]
            lines += [below.lineno for below in inner]
    return lines
