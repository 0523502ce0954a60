"""The rule that keeps the house: algorithm files import no framework, rooms do not see each other."""

import ast

import pytest

FRAMEWORKS = ("diffusers", "transformers", "vllm", "sglang", "deepspeed", "torchrec")
LOADED = "import sys; print(*sorted(set({names!r}) & set(sys.modules)))"


def rooms(root):
    return sorted(path.parent for path in (root / "plugins" / "forerun").glob("*/__init__.py"))


def algorithm_modules(root):
    return [
        f"forerun.{file.parent.name}.{file.stem}"
        for room in rooms(root)
        for file in sorted(room.glob("*.py"))
        if not file.stem.startswith((*FRAMEWORKS, "__init__"))  # a framework's files carry its name
    ]


def test_algorithm_modules_load_no_framework(root, run_python):
    modules = algorithm_modules(root)
    rooms = {"forerun.picard.window", "forerun.dlrm.search", "forerun.runahead.partition", "forerun.moe.grouping"}
    assert rooms <= set(modules)
    loaded = run_python(f"import {', '.join(modules)}; " + LOADED.format(names=FRAMEWORKS))
    assert loaded.split() == []


@pytest.mark.parametrize("module", ["forerun", "forerun.cli", "forerun.doctor", "forerun.demo", "forerun.report"])
def test_the_house_loads_nothing_heavy(module, run_python):
    heavy = (*FRAMEWORKS, "torch", "numpy", "scipy", "matplotlib")
    assert run_python(f"import {module}; " + LOADED.format(names=heavy)).split() == []


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_do_not_import_each_other(root):
    names = {room.name for room in rooms(root)}
    assert {"picard", "dlrm", "runahead", "moe"} <= names
    strangers = [
        f"{file.relative_to(root)}: {name}"
        for room in rooms(root)
        for file in room.glob("*.py")
        for name in imported(file)
        if name.startswith("forerun.") and name.split(".")[1] in names - {room.name}
    ]
    assert strangers == []
