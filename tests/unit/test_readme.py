"""The two READMEs say the same, and what they and the quickstart tell people to type can be typed."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers.environment import ROOT

from configs.command_line import configure, parse, usage
from configs.download import DownloadConfig
from configs.results import ConverterConfig, MergeConfig
from configs.serving import ApiConfig, ChatConfig
from configs.serving_check import ServingCheckConfig
from configs.training import TrainingConfig
from scripts import quickstart
from utils.model.families import FAMILIES

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
BOTH = pytest.mark.parametrize("readme", [ENGLISH, CHINESE])
MERGE = "inference/hf-text-generation-inference/merge_lora_weights.py"
COMMANDS = {
    "model_download.py": DownloadConfig,
    "llama_finetuning.py": TrainingConfig,
    "generate.py": ChatConfig,
    "api_stream.py": ApiConfig,
    MERGE: MergeConfig,
    "inference/verify_serving.py": ServingCheckConfig,
    "inference/checkpoint_converter_fsdp_hf.py": ConverterConfig,
}
OUR_FLAGS = {name for config in COMMANDS.values() for name in re.findall(r"^  --(\S+)", usage(config), re.MULTILINE)}
TORCHRUN_FLAGS = {"nnodes", "nproc_per_node", "max_restarts"}
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def our_commands(shell: str) -> list[tuple[str, list[str]]]:
    """The project's scripts in a piece of shell, each with its arguments."""
    commands = []
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        script = next((word for word in words if word in COMMANDS), None)
        if script and words[0] not in ("pkill", "tail"):
            arguments = words[words.index(script) + 1 :]
            end = next((i for i, word in enumerate(arguments) if re.match(r"[0-9]?>|&|\|", word)), len(arguments))
            commands.append((script, arguments[:end]))
    return commands


def headings(readme: str) -> list[str]:
    """The marks of a README's headings, in order."""
    return re.findall(r"^(#+) ", CODE_BLOCK.sub("", text_of(readme)), re.MULTILINE)


def test_both_have_the_same_code():
    assert CODE_BLOCK.findall(text_of(CHINESE)) == CODE_BLOCK.findall(text_of(ENGLISH))


def test_both_have_the_same_sections():
    assert headings(CHINESE) == headings(ENGLISH)
    assert len(headings(ENGLISH)) > 5


@BOTH
def test_commands_are_understood(readme):
    commands = our_commands(
        "\n".join(body for language, body in CODE_BLOCK.findall(text_of(readme)) if language == "bash")
    )
    assert {script for script, _arguments in commands} == set(COMMANDS)
    for script, arguments in commands:
        parse(COMMANDS[script], arguments)


def test_commands_of_the_quickstart_are_understood():
    commands = our_commands(quickstart.commands("owner/name"))
    assert [script for script, _arguments in commands] == list(COMMANDS)[:-2]  # it has no use for the last two
    for script, arguments in commands:
        parse(COMMANDS[script], arguments)
    for settings in (quickstart.PRETRAINING, "--use_peft " + quickstart.TUNING):
        parse(TrainingConfig, settings.split())


@pytest.mark.parametrize("file", [ENGLISH, CHINESE, "scripts/quickstart.py"])
def test_flags_exist(file):
    text = text_of(file)
    if file != "scripts/quickstart.py":  # commands in code blocks are parsed whole, above
        text = "\n".join(re.findall(r"`(.+?)`", CODE_BLOCK.sub("", text)))
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w.]*[a-z0-9])", text))
    assert len(flags) > 8
    assert not flags - OUR_FLAGS - TORCHRUN_FLAGS - {"help"}


def test_calls_from_python_are_understood(monkeypatch):
    """The README's own code, with functions in the commands' place that read the settings and return a folder."""
    called = []

    def standing_in(script):
        def main(**settings):
            called.append((script, configure(COMMANDS[script], settings)))
            return Path("folder")

        return main

    for script in COMMANDS:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(module, "main", standing_in(script))
    (code,) = [body for language, body in CODE_BLOCK.findall(text_of(ENGLISH)) if language == "python"]
    exec(code, {})
    settings = dict(called)
    assert list(settings) == ["model_download.py", "llama_finetuning.py", "generate.py", MERGE]
    assert settings["llama_finetuning.py"].lora_config.r == 16
    assert settings["generate.py"].lora_weights == settings[MERGE].peft_model == "folder"


@BOTH
def test_links_lead_somewhere(readme):
    text = text_of(readme)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:ft_datasets|docs|configs|utils|inference)/[^` ]+)`", text)
    assert len(links) >= 3
    assert not [path for path in [*links, *named, *COMMANDS] if not (ROOT / path).exists()]


@BOTH
def test_the_families_of_models_are_those_of_the_code(readme):
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (\S+) \|$", text_of(readme), re.MULTILINE)
    named = {name: (known_by, fast in ("yes", "有")) for name, known_by, fast in rows}
    assert named == {name: (family.known_by, family.has_fast_layers) for name, family in FAMILIES.items()}


@BOTH
def test_make_has_the_targets(readme):
    typed = re.findall(r"`.+?`|^make .+", text_of(readme), re.MULTILINE)
    wanted = set(re.findall(r"\bmake (\w+)", "\n".join(typed)))
    assert {"quickstart", "venv", "test", "lint"} <= wanted
    assert wanted <= set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
