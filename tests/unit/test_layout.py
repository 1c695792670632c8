"""Imports go down the levels that utils/__init__.py lists, and in no circle; `make levels` prints them.

(import-linter 2.17 was tried: it holds levels as well, but sees packages alone, neither the commands at the top nor a
folder with hyphens; a new package without a level passes; that configs use the standard library alone can't be said.)
"""

import ast
import graphlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FREE = {"benchmarks", "tests"}
"""They may import anything."""
FREE_OF_TORCH = {"ft_datasets", "utils.download"}
FOLDERS = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name not in FREE]
FILES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))]
SOURCES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text(encoding="utf-8")
    for file in FILES
}
LEVEL = {
    place.removesuffix(".py").replace("/", "."): int(number)
    for number, places in re.findall(r"^ +(\d+)  (.+)$", SOURCES["utils"], re.MULTILINE)
    for place in places.split(", ")
}
COMMANDS = {module for module, source in SOURCES.items() if '\nif __name__ == "__main__":' in source}


def imported(source: str) -> set[str]:
    """What a source imports, in functions and for type checkers too: modules of the house, and names of libraries."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import names the whole path"
            names |= {name if (name := f"{node.module}.{a.name}") in SOURCES else node.module for a in node.names}
    return {name if name in SOURCES else name.partition(".")[0] for name in names}


IMPORTS = {module: imported(source) for module, source in SOURCES.items()}


def place_of(module: str) -> str:
    """The place with a level that a module belongs to; '' = none."""
    if module in COMMANDS:
        return "commands"
    return max((place for place in LEVEL if f"{module}.".startswith(f"{place}.")), key=len, default="")


def package_of(module: str) -> str:
    """The package that a module lies in; a command, or a file with a level of its own, stands for itself."""
    is_package = any(name.startswith(f"{module}.") for name in SOURCES)
    package = module if is_package else module.rpartition(".")[0]
    return module if module in COMMANDS else max(package, place_of(module), key=len)


def complaint(module: str, target: str) -> str:
    """What is wrong with one module's import of another one, or of a library; '' = nothing."""
    here, there = place_of(module), place_of(target)
    if target not in SOURCES:
        is_wrong = here == "configs" and target not in sys.stdlib_module_names | {"fire"}  # which makes the call
        return "configs use the standard library alone" if is_wrong else ""
    if not here or not there:
        return "no level on one side"
    if target in COMMANDS:
        return "a command is for people"
    if here != there:
        return "not downwards" if LEVEL[here] <= LEVEL[there] else ""
    return "flat files don't import sub-packages" if package_of(target).startswith(f"{package_of(module)}.") else ""


def problems(imports: dict[str, set[str]]) -> list[str]:
    """All that is wrong with who imports whom, a line each."""
    pairs = [(module, target) for module, targets in imports.items() for target in targets]
    found = [f"{module} -> {target}: {text}" for module, target in pairs if (text := complaint(module, target))]
    found += [f"{module}: no level" for module, targets in imports.items() if targets and not place_of(module)]
    packages = {package_of(module): set() for module in imports}
    for module, target in pairs:
        if target in SOURCES and package_of(target) != package_of(module):
            packages[package_of(module)].add(package_of(target))
    for graph in (imports, packages):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(f"{' -> '.join(reversed(error.args[1]))}: a circle")
    reached, left = set(), {module for module in imports if place_of(module) in FREE_OF_TORCH}
    while left:
        reached |= left
        left = {target for module in left for target in imports.get(module, ())} - reached
    return found + (["torch, where data are read or downloaded"] if "torch" in reached else [])


def test_imports_go_down_and_in_no_circle():
    assert {*LEVEL.values()} == {*range(1, 11)} and LEVEL.keys() <= SOURCES.keys() | {"commands"}
    assert not problems(IMPORTS)


@pytest.mark.parametrize(
    "planted, found",
    [
        ("utils.rows.schedule -> utils.training.loss", "not downwards"),
        ("utils.model.folder -> utils.runs.folder", "not downwards"),  # on one level
        ("utils.rows.schedule -> utils.rows.packing", "circle"),  # which imports it
        (
            "inference.web.polling -> inference.terminal.chat, "
            "inference.terminal.chat -> inference.web.stream_sessions",
            "circle",
        ),  # of packages
        ("inference.engine -> inference.terminal.chat", "flat"),
        ("inference.loading -> generate", "command"),
        ("utils.reports.run -> inference.checkpoint_converter_fsdp_hf", "command"),
        ("scripts.catalogue -> scripts.quickstart", "command"),
        ("utils -> configs.errors", "no level"),
        ("configs.errors -> yaml", "standard library"),
        ("utils.download.part -> torch", "torch, where"),
        ("ft_datasets.examples -> torch", "torch, where"),
        ("utils.files -> torch", "torch, where"),  # which imports it
    ],
)
def test_what_goes_wrong_is_found(planted, found):
    imports = dict(IMPORTS)
    for line in planted.split(", "):
        module, target = line.split(" -> ")
        assert target in SOURCES or "." not in target, "the plant itself is out of date"
        imports[module] = imports[module] | {target}
    assert [line for line in problems(imports) if found in line]


def test_all_imports_are_read():
    source = """
import configs.errors as e, numpy.linalg
from utils.download import http
from utils.files import sha256
if TYPE_CHECKING:
    from inference.web.polling import Polling
def f():
    from torch.nn import functional
"""
    modules = {"configs.errors", "utils.download.http", "utils.files", "inference.web.polling"}
    assert imported(source) == modules | {"numpy", "torch"}


def test_every_package_has_its_sign():
    signs = {file: file.read_text(encoding="utf-8") for file in FILES if file.name == "__init__.py"}
    assert not [file for file, source in signs.items() if not ast.get_docstring(ast.parse(source))]


def test_the_map_for_people_has_the_same_levels():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `?([\w/]+?)(?:/|\.py)?`? \|", text, re.MULTILINE)
    assert {place.replace("/", "."): int(level) for level, place in rows} == LEVEL


if __name__ == "__main__":
    files = Counter(map(place_of, SOURCES))
    for level in sorted({*LEVEL.values()}, reverse=True):
        print(level, ", ".join(f"{place} ({files[place]})" for place in LEVEL if LEVEL[place] == level))
    print("(In brackets: how many files.)")
    print("\n".join(problems(IMPORTS)) or "All imports go down, and in no circle.")
