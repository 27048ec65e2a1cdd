"""The house: which room may import which, and a few things that no room may do. Read from the source, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unmask"

# From the top down. A room may import any room of a lower row, and none of its own row.
ROWS = (
    ("__main__",),
    ("cli",),
    ("comparison",),
    ("estimation", "diagnosis", "harness"),
    ("api", "plan", "merging", "energy"),
    ("launch", "counting"),
    ("bases",),
    ("build", "run_log", "self_check"),
    ("trainer",),
    ("strategies",),
    ("data_check",),
    ("evaluation", "pareto", "report", "doctor", "detectors", "preferences"),
    ("figures",),
    ("rollout", "runs", "checkpoint", "demonstrations", "critic", "kept"),
    ("objectives", "scoring", "samplers", "sharding", "buffer"),
    ("corruption", "corruption_steps", "likelihood", "advantages", "models", "tasks"),
    ("noise", "ranks"),  # tasks draw their puzzles with noise
    ("config", "schedule", "rows", "sandbox", "protocols"),
    ("types", "optional", "places", "isolation", "files", "intervals", "tables", "user_code"),
    ("errors",),
    ("unmask",),  # the package itself: the version, and names that are looked up when first used
    ("_auto",),
)
ROW = {room: number for number, row in enumerate(ROWS) for room in row}

# Arrows that point downwards and are unwanted all the same: masks are drawn through the NoiseLike protocol,
# algorithms never see a model, tasks judge strings, and a model knows nothing of recipes.
FORBIDDEN = {
    ("corruption", "noise"),
    ("objectives", "models"),
    ("objectives", "noise"),
    ("objectives", "tasks"),
    ("samplers", "models"),
    ("samplers", "noise"),
    ("samplers", "tasks"),
    ("scoring", "models"),
    ("trainer", "models"),
    ("trainer", "objectives"),
    ("trainer", "tasks"),
    ("evaluation", "tasks"),
    ("rollout", "tasks"),
}

# `import unmask` and `unmask --help` must not import torch, so these import by name when asked; and optional.py is the
# one way to a package that may be missing. A user's rewards are named in a recipe, and a sandbox worker's preloaded
# modules by whoever starts it.
IMPORT_BY_NAME = {
    "__init__.py", "_auto.py", "cli/__init__.py", "optional.py", "user_code.py", "sandbox/inside/supervisor.py",
}  # fmt: skip

CONFINED = "sandbox/inside/"
"""Run in confined processes alone, where programs that are not trusted are executed."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, P90_FUNCTION_LINES = 500, 90, 45


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str  # relative to the package
    tree: ast.Module
    num_lines: int

    @property
    def room(self) -> str:
        first = Path(self.name).parts[0].removesuffix(".py")
        return "unmask" if first == "__init__" else first


def read_modules(source: Path) -> list[Module]:
    files = sorted(source.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [
        Module(str(file.relative_to(source)), ast.parse(text), len(text.splitlines()))
        for file, text in zip(files, texts, strict=True)
    ]


MODULES = read_modules(SOURCE)


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names of our own modules that an import statement reaches; empty for any other node."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = "unmask" + (f".{node.module}" if node.module else "") if node.level else node.module or ""
        names = [f"{base}.{alias.name}" for alias in node.names] if base == "unmask" else [base]
    else:
        return []
    return [name for name in names if name.split(".")[0] == "unmask"]


def room_of(dotted: str) -> str:
    """unmask.models.tiny -> models; unmask and unmask.__version__ -> unmask."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else "unmask"


def arrow_faults(modules: list[Module]) -> list[str]:
    """Imports that do not point to a lower row, anywhere in a file, also inside functions."""
    faults = []
    for module in modules:
        for node in ast.walk(module.tree):
            for target in map(room_of, imported_names(node)):
                if target == module.room:
                    continue
                known = target in ROW and module.room in ROW
                if not known or ROW[target] <= ROW[module.room] or (module.room, target) in FORBIDDEN:
                    faults.append(f"{module.name}:{node.lineno} imports {target}")
    return faults


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def hidden_import_faults(modules: list[Module]) -> list[str]:
    """Our own modules imported inside functions, as a statement or by name."""
    faults = []
    for module in modules:
        for function in functions(module.tree):
            for node in ast.walk(function):
                by_name = isinstance(node, ast.Call) and called_name(node).endswith(("import_module", "__import__"))
                if imported_names(node) or (by_name and module.name not in IMPORT_BY_NAME):
                    faults.append(f"{module.name}:{node.lineno} imports inside {function.name}()")
    return faults


def called_name(call: ast.Call) -> str:
    """The dotted text of what is called: torch.load, eval, ..."""
    return ast.unparse(call.func)


def danger_faults(modules: list[Module]) -> list[str]:
    """Ways in which a file or a model's text could run as code."""
    faults = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found = [name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal")]
            elif isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found = [called_name(node)] if called_name(node) in ("eval", "exec", "torch.load", "torch.save") else []
                found = [name for name in found if name != "exec" or not module.name.startswith(CONFINED)]
                trusted = keywords.get("trust_remote_code", "False") != "False"
                # our own model classes run no code of a directory; the Auto classes ask the user unless told not to
                asks = ast.unparse(node.func).startswith("Auto") and "trust_remote_code" not in keywords
                asks = asks and called_name(node).endswith("from_pretrained")
                found += ["trust_remote_code"] if trusted or asks else []
            else:
                continue
            faults += [f"{module.name}:{node.lineno} uses {name}" for name in found]
    return faults


GLOBAL_DRAWS = ("random.", "np.random.", "numpy.random.", "torch.seed", "torch.random.seed", "torch.set_rng_state")
TORCH_DRAWS = ("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial", "torch.bernoulli")


def global_random_faults(modules: list[Module]) -> list[str]:
    """Draws from, or seeding of, a generator that the whole process shares; allowed where it is forked first."""
    faults = []
    for module in modules:
        forked = [
            node
            for block in ast.walk(module.tree)
            if isinstance(block, ast.With) and any("fork_rng" in ast.unparse(item) for item in block.items)
            for node in ast.walk(block)
        ]
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call) or node in forked:
                continue
            name = called_name(node)
            has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
            if name.startswith("np.random.RandomState") and "RandomState()" not in ast.unparse(node):
                continue  # a seeded generator of its own
            if name in ("torch.manual_seed", "torch.cuda.manual_seed_all") or name.startswith(GLOBAL_DRAWS):
                faults.append(f"{module.name}:{node.lineno} calls {name}")
            elif name in TORCH_DRAWS and not has_generator:
                faults.append(f"{module.name}:{node.lineno} calls {name} without a generator")
    return faults


def lengths(module: Module) -> list[tuple[int, str]]:
    """(lines, name) of each function, its docstring included."""
    return [(f.end_lineno - f.lineno + 1, f"{module.name}:{f.name}") for f in functions(module.tree)]


@pytest.mark.parametrize("find", [arrow_faults, hidden_import_faults, danger_faults, global_random_faults])
def test_source_is_free_of(find):
    assert find(MODULES) == []


def test_every_room_has_a_place():
    assert {module.room for module in MODULES} <= set(ROW)


def test_functions_and_files_stay_short():
    measured = sorted((found for module in MODULES for found in lengths(module)), reverse=True)
    assert [found for found in measured if found[0] > MAX_FUNCTION_LINES] == []
    assert measured[len(measured) // 10][0] < P90_FUNCTION_LINES
    assert [(m.name, m.num_lines) for m in MODULES if m.num_lines > MAX_FILE_LINES] == []


BREACHES = {
    arrow_faults: [
        ("likelihood.py", "from unmask.trainer import Trainer"),
        ("likelihood.py", "def f():\n    import unmask.trainer"),
        ("samplers/roar.py", "from unmask.objectives import ESPO"),
        ("corruption.py", "from unmask.likelihood import elbo"),
        ("corruption.py", "from unmask.noise import Noise"),
        ("objectives/espo.py", "from ..trainer import Trainer"),
        ("objectives/espo.py", "from unmask import models"),
        ("new_room.py", "from unmask.types import Score"),
        ("types.py", "from unmask.new_room import x"),
    ],
    hidden_import_faults: [
        ("launch.py", "def f():\n    from unmask.models import load"),
        ("launch.py", "class A:\n    def f(self):\n        import unmask.errors"),
        ("launch.py", "def f():\n    return importlib.import_module('unmask.models')"),
    ],
    danger_faults: [
        ("tasks/a.py", "x = eval('1')"),
        ("tasks/a.py", "exec('1')"),
        ("models/a.py", "import pickle"),
        ("models/a.py", "from pickle import loads"),
        ("models/a.py", "torch.load('x.bin')"),
        ("models/a.py", "AutoModel.from_pretrained('x', trust_remote_code=True)"),
        ("models/a.py", "AutoTokenizer.from_pretrained('x')"),
    ],
    global_random_faults: [
        ("rollout.py", "torch.manual_seed(0)"),
        ("rollout.py", "import random\nrandom.shuffle([])"),
        ("rollout.py", "np.random.rand(3)"),
        ("rollout.py", "np.random.RandomState().rand(3)"),
        ("rollout.py", "torch.rand(3)"),
    ],
}


@pytest.mark.parametrize(
    ("find", "name", "text"), [(find, name, text) for find, cases in BREACHES.items() for name, text in cases]
)
def test_a_breach_is_found(find, name, text):
    assert len(find([Module(name, ast.parse(text), 1)])) >= 1


def test_what_is_allowed_is_not_a_breach():
    text = "from unmask.types import Score\nfrom unmask import __version__\ntorch.rand(3, generator=g)\nmodel.eval()"
    text += "\nnp.random.RandomState(42).choice(3)"
    forked = "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)"
    modules = [Module("objectives/a.py", ast.parse(text), 4), Module("models/a.py", ast.parse(forked), 2)]
    for find in BREACHES:
        assert find(modules) == []
