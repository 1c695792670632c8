"""Which sources the command line means, and which token is for which."""

import os

from huggingface_hub import get_token
from huggingface_hub.constants import is_offline_mode

from configs.errors import UserError
from configs.messages import _
from utils.download.http import host_name, origin
from utils.download.huggingface import HuggingFaceSource
from utils.download.modelscope import ModelScopeSource
from utils.download.source import HUGGINGFACE, Source

SHORT_NAMES = {
    "huggingface": HUGGINGFACE,
    "hf-mirror": "https://hf-mirror.com",
    "modelscope": "https://modelscope.cn",
}
MODELSCOPE_HOSTS = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")


def make_sources(endpoints: list[str], repo_id: str, repo_type: str, token: str, timeout: float) -> list[Source]:
    """The sources in the order in which they are asked. The given token is for the first, a saved one for Hugging Face.

    Raises:
        UserError: offline mode is set, or ModelScope is asked for something that is not a model.
    """
    if is_offline_mode():
        raise UserError(_("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download."))
    sources: list[Source] = []
    for endpoint in endpoints or [os.environ.get("HF_ENDPOINT") or HUGGINGFACE]:
        endpoint = SHORT_NAMES.get(endpoint, endpoint)
        is_modelscope = host_name(endpoint) in MODELSCOPE_HOSTS
        if is_modelscope and repo_type != "model":
            raise UserError(_("From modelscope only models can be fetched here. Leave it out, or --repo_type."))
        saved = get_token() if origin(endpoint) == origin(HUGGINGFACE) else None
        own_token = (token if not sources else "") or saved
        kind = ModelScopeSource if is_modelscope else HuggingFaceSource
        sources.append(kind(endpoint, repo_id, repo_type, own_token, timeout))
    return sources
