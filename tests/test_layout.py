"""layout: which room may import which, and how long what one reads may be. All of it is read from the source."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minirlhf"
SCRIPTS = ["train_sft.py", "train_rm.py", "train_ppo.py", "train_dpo.py"]
# Each may import what stands before it, and itself; data and kernels do not know each other.
BASE = ("checks", "seeds", "devices")
ROOMS = {
    "kernels": ("base",),
    "data": ("base",),
    "model": ("base", "kernels", "data"),
    "run": ("base", "kernels", "data", "model"),
    "algorithms": ("base", "data", "model", "run"),
    "commands": ("base", "kernels", "data", "model", "run", "algorithms"),
}
READ = ["algorithms/ppo.py", "algorithms/rollout.py", "algorithms/logprobs.py"]
READ_FURTHER = [
    "algorithms/rewards.py", "algorithms/training.py", "model/gpt.py", "model/generate.py", "model/sampling.py",
    "model/token_stats.py",
]  # fmt: skip

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name) for name in FILES}


def room_of(module: str) -> str:
    """The folder; base; or door, a file of the top floor that lends another one its name."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "base" if first in BASE else "door"


def imports(name: str) -> set[tuple[str, str]]:
    """(module, name) of everything of the package that a file imports; name is "" where it is the module itself."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {(alias.name.partition(".")[2], "") for alias in node.names if alias.name.startswith("minirlhf.")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minirlhf":
            module = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                found.add((inner, "") if inner in MODULES else (module, alias.name))
    return found


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if room_of(module_of(name)) != "door"])
def test_imports_go_down_only(name):
    room = room_of(module_of(name))
    allowed = {*ROOMS.get(room, ()), room}
    wrong = {module for module, _ in imports(name) if module and room_of(module) not in allowed}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_no_file_imports_itself_by_way_of_others():
    arrows = {module_of(name): {module for module, _ in imports(name) if module} for name in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        walk(module, ())
    assert len(done) == len(arrows)


@pytest.mark.parametrize("name", FILES)
def test_nobody_takes_a_private_name_of_another_file(name):
    taken = {f"{module}.{given}" for module, given in imports(name) if given.startswith("_") and given != "__version__"}
    modules = {
        node.names[0].asname or node.names[0].name for node in ast.walk(tree(name)) if isinstance(node, ast.Import)
    }
    own = {
        alias.asname or alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minirlhf")
        for alias in node.names
        if f"{node.module.partition('.')[2]}.{alias.name}".strip(".") in MODULES
    }
    for node in ast.walk(tree(name)):
        of_module = (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own - modules
        )
        if of_module and node.attr.startswith("_") and not node.attr.startswith("__"):
            taken.add(f"{node.value.id}.{node.attr}")
    assert not taken


def test_nothing_imports_a_script():
    scripts = {script.removesuffix(".py") for script in SCRIPTS}
    for name in FILES:
        for node in ast.walk(tree(name)):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {module.partition(".")[0] for module in named} & scripts, name


def test_the_equations_import_nothing_but_torch():
    taken = set()
    for node in ast.walk(tree("algorithms/losses.py")):
        taken |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        taken |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert {module.partition(".")[0] for module in taken} - set(sys.stdlib_module_names) == {"torch", "jaxtyping"}


def test_one_file_at_most_knows_of_several_processes():
    assert sum("torch.distributed" in (PACKAGE / name).read_text() for name in FILES) <= 1


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room):
    said = ast.get_docstring(tree(f"{room}/__init__.py"))
    assert "May be imported by:" in said and "Imports:" in said


# --- the book ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("algorithms/")])
def test_kernel_and_precision_are_said_on_the_model_alone(name):
    for function in functions(name):
        parameters = {a.arg for a in (*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs)}
        assert not parameters & {"kernel", "dtype"}, f"{name}: {function.name}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_and_no_function_is_too_long(name):
    assert lines(PACKAGE / name) <= 450
    long = {function.name: function.end_lineno - function.lineno + 1 for function in functions(name)}
    assert {function: n for function, n in long.items() if n > 90} == {}


def test_ppo_reads_top_to_bottom():
    assert lines(PACKAGE / "algorithms/ppo.py") <= 300
    (train,) = (function for function in functions("algorithms/ppo.py") if function.name == "train")
    assert train.end_lineno - train.lineno + 1 <= 90
    assert len([*train.args.args, *train.args.kwonlyargs]) <= 8


def test_an_equation_is_twenty_lines_of_code_at_most():
    for function in functions("algorithms/losses.py"):
        first = function.body[1] if ast.get_docstring(function) else function.body[0]
        assert function.end_lineno - first.lineno + 1 <= 20, function.name


def test_the_way_to_ppo_is_short():
    equations = (PACKAGE / "algorithms/losses.py").read_text().partition("# --- preferences")[0]
    assert "def policy_loss" in equations and "def gae" in equations
    short = lines(ROOT / "train_ppo.py") + len(equations.splitlines()) + sum(lines(PACKAGE / name) for name in READ)
    assert short <= 900
    assert short + sum(lines(PACKAGE / name) for name in READ_FURTHER) <= 2200


# --- the doors --------------------------------------------------------------------------------------------------------


def test_the_top_floor_is_doors_and_what_everybody_uses():
    doors = {name for name in FILES if "/" not in name and room_of(module_of(name)) == "door"} - {"__init__.py"}
    assert doors == {
        "__main__.py", "best_of_n.py", "convergence.py", "evaluate.py", "exact.py", "generate.py", "plot.py", "ppo.py",
        "reward_report.py", "rewards.py", "runs.py", "sampling.py", "token_stats.py",
    }  # fmt: skip
    for door in doors - {"__main__.py"}:
        assert lines(PACKAGE / door) <= 15, door
        assert not functions(door), f"{door}: a door holds no code of its own"


def test_the_list_of_commands_has_them_all(capsys):
    from minirlhf.__main__ import COMMANDS, main

    main()
    said = capsys.readouterr().out
    for script in SCRIPTS:
        assert f"python {script} " in said
    for command in COMMANDS:
        if command.startswith("-m "):
            module = command.removeprefix("-m minirlhf.")
            assert f"{module}.py" in FILES or f"{module}/__main__.py" in FILES
            assert f"python {command} " in said
    runs_as_a_module = {module_of(name) for name in FILES if "/" not in name and '__name__ == "__main__"' in
                        (PACKAGE / name).read_text()} - {"__main__"}  # fmt: skip
    assert runs_as_a_module | {"kernels"} == {c.removeprefix("-m minirlhf.") for c in COMMANDS if c.startswith("-m ")}
