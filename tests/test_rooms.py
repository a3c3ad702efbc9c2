"""The rooms of the house: what is in one may use what is in those before it, and nothing after."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from ddil_agents.commands.agents import agent_names

ORDER = (  # packages, and the files that lie beside them; the algorithms and commands, one a file, are last
    "devices",
    "flags",
    "settings",
    "states",
    "config",
    "agent",
    "training",
    "algorithm",
    "action_matching",
    "evaluation",
    "commands",
    "comparison",
)


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file imports when it runs: not those of its type hints alone."""
    tree = ast.parse(path.read_text())
    hints = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(n) for hint in hints for n in ast.walk(hint)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            found |= {name if name in known else node.module for name in (f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import) and id(node) not in skipped:
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def room(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return ORDER.index(part) if part in ORDER else len(ORDER)


def test_imports_between_rooms_run_one_way() -> None:
    known = modules("ddil_agents")
    against = [
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imports(path, known)
        if other != "ddil_agents" and room(other) > room(module)
    ]
    assert against == []


@pytest.mark.parametrize("package", ["ddil_agents", "ddil_env"])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    known = modules(package)
    graph = {module: imports(path, known) - {module, package} for module, path in known.items() if module != package}
    while ends := [module for module in graph if not graph[module] & graph.keys() or not any(module in graph[other] for other in graph)]:
        for module in ends:
            del graph[module]
    assert sorted(graph) == []


def test_an_algorithms_file_can_be_deleted_without_breaking_another(tmp_path: Path) -> None:
    known = modules("ddil_agents")
    algorithms = {f"ddil_agents.{name}" for name in agent_names() if f"ddil_agents.{name}" in known}
    assert len(algorithms) >= 10
    importers = {module: imports(path, known) & algorithms for module, path in known.items() if module != "ddil_agents"}
    assert {module: sorted(found) for module, found in importers.items() if found} == {}
    shutil.copytree(ROOT / "ddil_agents", tmp_path / "ddil_agents", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ddil_agents" / "bc.py").unlink()
    code = "from ddil_agents import *; import ddil_agents; from ddil_agents.commands.agents import agent_names, find_agent; "
    code += "print(*map(find_agent, agent_names())); assert 'Dagger' in globals() and not hasattr(ddil_agents, 'BehaviourCloning')"
    where = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": where}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("<class") == len(algorithms) - 1


def test_imports_inside_functions_are_of_optional_packages() -> None:
    late = set()
    for package in ("ddil_agents", "ddil_env"):
        for path in (ROOT / package).rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    found = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
                    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in found]
                    late |= {(name.split(".")[0], str(path.relative_to(ROOT))) for name in names}
    optional = {"bitsandbytes", "minari", "peft", "lpips", "open_clip", "stable_baselines3", "torch_fidelity", "trackio", "wandb"}
    slow = {  # all commands would start more than twice as slowly
        ("diffusers", "ddil_env/experts/digits.py"),
        ("sklearn", "ddil_env/experts/digits.py"),
        ("ddil_agents", "ddil_agents/evaluation/metrics/extractors.py"),
    }
    assert {name for name, _ in late - slow} <= optional, late


def test_the_environment_knows_no_agents() -> None:
    known = modules("ddil_agents")
    assert [module for module, path in modules("ddil_env").items() if imports(path, known)] == []
