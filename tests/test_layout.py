"""The structure that readers rely on: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "pipelines": set(),
    "model": set(),
    "eval": {"pipelines", "model"},
    "train": {"pipelines", "model", "eval"},
    "tools": {"pipelines", "model", "eval", "train"},
}


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_those_below_them(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        siblings = imported_packages(file) & ALLOWED.keys() - {package}
        assert siblings <= ALLOWED[package], f"{file} imports {siblings - ALLOWED[package]}"


def test_importing_the_packages_loads_no_optional_heavy_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pipelines.loaders, model.twin, model.loss, train.config, tools.cli\n"
        "print(*sorted({'ffcv', 'nvidia.dali', 'matplotlib', 'tensorboard'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_the_command_line_starts_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, tools.cli\nprint(*sorted({'torch', 'torchvision', 'PIL'} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
