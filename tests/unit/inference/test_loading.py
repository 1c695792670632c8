"""What is refused before a model is loaded, which takes minutes."""

from types import SimpleNamespace

import pytest

from configs.errors import UserError
from inference import loading


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
