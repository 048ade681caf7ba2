"""Imports go down only, and a few things are known in one place only: read off the source."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "attention_patterns": 0,
    "draft_pattern": 0.5,
    "types": 0.5,
    "schedules": 1,
    "layouts": 1,
    "files": 0,
    "progress": 0,
    "lock": 1,
    "sharding": 1,
    "categorical": 1,
    "processes": 2,
    "nn": 2,
    "data": 2,
    "models": 3,
    "objectives": 3,
    "samplers": 3,
    "training": 4,
    "evaluation": 4,
    "visualize": 4,
    "config": 5,
    "validation": 5.5,
    "loaded_model": 5.8,  # a config or a workdir as a network
    "build": 6,  # assembles what a config says
    "convert": 6.4,  # other people's models
    "inference": 6.5,  # writes with it
    "serving": 6.6,  # lends it to others
    "planning": 6.6,  # uses the library, which never imports it
    "configs": 6.8,
    "launch": 7,  # launchers may name a config, never the other way round
}
FILES = sorted(path for house in ("diffusion_lm", "configs", "launch") for path in (ROOT / house).rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def home(module: str) -> str | None:
    """diffusion_lm.nn.cache -> nn; None for what is not ours."""
    parts = module.split(".")
    if parts[0] in ("configs", "launch"):
        return parts[0]
    return parts[1] if parts[0] == "diffusion_lm" and len(parts) > 1 else None


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Chain module that a file imports, and every name that it imports from one, dotted."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(path: Path) -> set[str]:
    """The last name of everything that a file calls or mentions as an attribute."""
    return {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)} | {
        node.id for node in nodes(path) if isinstance(node, ast.Name)
    }


def who(knows) -> set[str]:
    return {name(path) for path in FILES if knows(path)}


def imports_package(*packages):
    return lambda path: any(module == p or module.startswith(p + ".") for module in imports(path) for p in packages)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down(path):
    own = home(name(path).removesuffix(".py").replace("/", "."))
    assert own in FLOORS, f"{name(path)} has no floor"
    for module in imports(path):
        other = home(module)
        if other is None or other == own:
            continue
        assert other in FLOORS, f"{name(path)} imports {module}, which has no floor"
        assert FLOORS[other] < FLOORS[own], f"{name(path)} (floor {FLOORS[own]}) imports {module} ({FLOORS[other]})"


@pytest.mark.parametrize("house", ["objectives", "samplers"])
def test_objectives_and_samplers_never_see_a_network(house):
    assert not who(
        lambda path: f"/{house}/" in f"/{name(path)}" and imports_package("diffusion_lm.nn", "flax.linen")(path)
    )


def test_only_the_launchers_know_flags():
    for path in FILES:
        if imports_package("absl.flags", "absl.app", "argparse")(path):
            assert name(path).startswith("launch/"), name(path)


def test_only_the_checkpoints_know_orbax():
    assert who(imports_package("orbax")) <= {"diffusion_lm/training/checkpoint.py"}


def test_only_the_loader_knows_grain():
    allowed = {"diffusion_lm/data/loader.py", "diffusion_lm/training/checkpoint.py"}
    assert who(imports_package("grain")) <= allowed


def test_checkpoints_see_only_grains_checkpoints():
    path = ROOT / "diffusion_lm/training/checkpoint.py"
    if path.exists():
        grains = {module for module in imports(path) if module.split(".")[0] == "grain"}
        assert all(module in ("grain", "grain.checkpoint") or ".checkpoint" in module for module in grains)


def test_no_tensorflow():
    assert not who(imports_package("tensorflow", "clu", "tensorflow_datasets"))


def test_only_sharding_knows_mesh_axes():
    """By name, or by laying an array out. ("data" alone is too common a word to look for.)"""

    def knows(path):
        axes = {node.value for node in nodes(path) if isinstance(node, ast.Constant)} & {"fsdp", "tensor"}
        return axes or calls(path) & {"PartitionSpec", "NamedSharding", "make_mesh_axes"}

    assert who(knows) <= {"diffusion_lm/sharding.py"}


def test_only_the_driver_loops():
    loops = who(lambda path: calls(path) & {"while_loop", "fori_loop"})
    # Blocks of a pass; chunks of a loss; a bisection.
    within = {f"diffusion_lm/{file}.py" for file in ("nn/moe", "nn/lm_head", "samplers/sampling_params")}
    assert loops - within == {"diffusion_lm/samplers/base.py"}


def test_only_append_writes_a_cache():
    """Nobody else builds a KVCache or updates a slice inside nn; samplers update slices of their text only."""
    assert who(lambda path: _called(path, "KVCache")) == {"diffusion_lm/nn/cache.py"}
    writers = {"dynamic_update_slice", "dynamic_update_slice_in_dim", "dynamic_update_index_in_dim"}
    for path in FILES:
        for node in nodes(path):
            if not (isinstance(node, ast.Call) and _last(node.func) in writers):
                continue
            if name(path) != "diffusion_lm/nn/cache.py":
                assert "/nn/" not in name(path), name(path)
                assert "cache" not in ast.unparse(node.args[0]), f"{name(path)}: {ast.unparse(node)}"


def _called(path: Path, what: str) -> bool:
    return any(isinstance(node, ast.Call) and _last(node.func) == what for node in nodes(path))


def _last(function: ast.AST) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
