"""Documents, comments and docstrings name files, headings and functions that are there."""

import re

import pytest
from helpers.environment import ROOT

DOCUMENTS = sorted(str(file.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md") for file in ROOT.glob(pattern))
FOLDERS = "benchmarks configs docs ft_datasets inference locale scripts tests utils".split()
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w")
FUNCTION = re.compile(r"\*\*`([\w.]+)`\*\* \(`([\w/]+\.py)`\)")


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(document: str) -> set[str]:
    """How links name the headings of a document."""
    headings = re.findall(r"^#+ (.+)", document.lower(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_a_file_and_a_heading(document):
    for path, heading in LINK.findall(read(document)):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), heading


def test_files_that_are_named_exist():
    files = [
        *DOCUMENTS,
        "Makefile",
        *ROOT.glob("*.py"),
        *(file for top in FOLDERS for file in (ROOT / top).rglob("*.py")),
    ]
    named = {(path, file) for file in files for path in PATH.findall(read(file))}
    assert len(named) > 200
    assert not [f"{path} in {file}" for path, file in named if not any(ROOT.glob(path))]


def test_functions_on_the_way_of_the_data_are_where_it_says():
    named = FUNCTION.findall(read("docs/dataflow.md"))
    assert len(named) > 20
    for name, file in named:
        for part in name.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b", read(file), re.MULTILINE), f"{name} is not in {file}"
