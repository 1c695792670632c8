"""What is refused before a model is loaded, which takes minutes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.serving import DEFAULT_BASE_MODEL
from inference import loading
from inference.loading import find_base


@pytest.mark.parametrize("name", ["check_adapter_folder", "template_of"])
def test_an_adapter_that_does_not_belong_is_refused_before_loading(tiny_model, tmp_path, monkeypatch, name):
    def refuse(*_arguments):
        raise UserError(f"{name} says no")

    monkeypatch.setattr(loading, "check_adapter_folder", lambda _adapter: None)
    monkeypatch.setattr(loading, name, refuse)
    monkeypatch.setattr("utils.model.weights.load_base_model", lambda *_arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"{name} says no"):
        loading.load_engine(str(tiny_model), str(tmp_path), None)


def test_a_tokenizer_that_is_too_large_is_refused_before_loading(tiny_model, monkeypatch):
    monkeypatch.setattr(loading, "Tokenizer", lambda _folder: SimpleNamespace(vocab_size=601))
    monkeypatch.setattr("utils.model.weights.load_base_model", lambda *_arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match="601"):
        loading.load_engine(str(tiny_model), "", None)


class TestTheBaseThatAnAdapterNames:
    @pytest.fixture(autouse=True)
    def _english_and_here(self, english, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def adapter(base: str | None, record: str | None = None) -> str:
        """A folder with what names the base: PEFT's file, and perhaps the record of a run."""
        folder = Path("adapter")
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        if record:
            rest = ("prompt_template", "bos_ids", "eos_id", "tokenizer_fingerprint", "base_model_fingerprint")
            described = {"settings": {"model_name": record}} | dict.fromkeys(rest)
            (folder / "training_config.json").write_text(json.dumps(described))
        return str(folder)

    def test_what_is_given_comes_first_and_the_default_last(self):
        adapter = self.adapter("base")
        Path("base").mkdir()
        assert find_base("mine", adapter) == "mine"
        assert find_base("", adapter) == "base"
        assert find_base("", "") == DEFAULT_BASE_MODEL

    @pytest.mark.parametrize("base", [None, "", 5])
    def test_a_name_that_is_none(self, base):
        assert find_base("", self.adapter(base)) == DEFAULT_BASE_MODEL

    def test_the_record_of_the_run_comes_before_that_of_peft(self):
        adapter = self.adapter("base", "recorded")
        for name in ("base", "recorded"):
            Path(name).mkdir()
        assert find_base("", adapter) == "recorded"

    def test_a_name_of_a_hub_is_found_where_it_is_downloaded_to(self):
        Path("models/owner/name").mkdir(parents=True)
        assert find_base("", self.adapter("owner/name")) == "models/owner/name"

    def test_an_adapter_that_names_none_gets_the_default(self):
        assert find_base("", self.adapter(None)) == DEFAULT_BASE_MODEL

    def test_the_default_does_only_where_the_record_can_prove_it(self):
        Path(DEFAULT_BASE_MODEL).mkdir(parents=True)
        adapter = self.adapter("/elsewhere/base", "/elsewhere/base")
        assert find_base("", adapter) == DEFAULT_BASE_MODEL
        (Path(adapter) / "training_config.json").unlink()
        with pytest.raises(UserError, match="over /elsewhere/base, and there is no such folder") as refusal:
            find_base("", adapter)
        assert "adapter in adapter" in str(refusal.value)
        assert "model_download.py --repo_id OWNER/NAME" in str(refusal.value)

    def test_what_is_to_be_downloaded_is_named(self):
        with pytest.raises(UserError, match="--repo_id owner/name\n"):
            find_base("", self.adapter("./models/owner/name"))

    def test_no_adapter(self):
        with pytest.raises(UserError, match="no adapter in nowhere"):
            find_base("", "nowhere")
