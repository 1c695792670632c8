"""The generation engine: one stream of text for the terminal and the API alike."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.serving import Sampling
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Turn, messages_of
from ft_datasets.prompt import TemplateRefusal
from inference.cache import KeyValueCache
from inference.detokenizer import IncrementalDecoder, StopText
from inference.sampling import choose
from utils.model.adapters import learnt_prefix
from utils.model.decoder import causal_lm, forward_hidden, logits
from utils.model.families import Rope
from utils.rows.segments import Segments

FinishReason = Literal["stop", "length", "cancelled"]


class PromptTooLong(UserError):
    """The prompt does not fit in the model's context."""


class PromptRefused(UserError):
    """The prompt template does not take the conversation."""


@dataclass
class Statistics:
    """Tokens and time that an answer took; filled in while it is streamed.

    Attributes:
        prompt_tokens, new_tokens: tokens in and out.
        seconds: from the first new token to the last.
        finish_reason: stop = the model ended its answer, length = max_new_tokens or the context did.
        token_ids: the answer's, the one that ended it among them.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason = "stop"
    token_ids: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, the prompt not counted."""
        return (self.new_tokens - 1) / self.seconds if self.seconds and self.new_tokens > 1 else 0.0


class Engine:
    """A loaded model that answers prompts, one at a time.

    Args:
        model: base model, with or without an adapter, in eval mode.
        encoder: the words that it was trained on, and its tokenizer.
    """

    def __init__(self, model: nn.Module, encoder: ChatEncoder) -> None:
        self.model, self.encoder, self.tokenizer = model, encoder, encoder.tokenizer
        self.context = Rope.of(causal_lm(model).config.to_dict()).context - learnt_prefix(model)[0].length
        self.device = causal_lm(model).get_input_embeddings().weight.device

    def encode_chat(self, prompt: str, history: Sequence[Turn] = (), system: str = "") -> list[int]:
        """The ids of a prompt after the earlier turns.

        Args:
            system: what the model is told before all turns; '' = nothing.

        Raises:
            PromptTooLong: they leave no room for an answer in the model's context.
            PromptRefused: the template does not take them.
        """
        ids = self._prompt_ids(prompt, history, system)
        if len(ids) >= self.context:
            raise PromptTooLong(
                _(
                    "The question, with what was said before, takes {tokens} tokens; this model's context has "
                    "{context}. Ask a shorter one, or begin a new conversation.",
                    tokens=len(ids),
                    context=self.context,
                )
            )
        return ids

    def _prompt_ids(self, prompt: str, history: Sequence[Turn], system: str) -> list[int]:
        try:
            return self.encoder.prompt_ids(messages_of(prompt, history, system))
        except TemplateRefusal as error:
            raise PromptRefused(
                _("This model's prompt template does not take the conversation: {error}", error=error)
            ) from error

    def recent_turns(self, prompt: str, history: Sequence[Turn], room: int, system: str = "") -> list[Turn]:
        """The latest turns of `history` that leave `room` tokens for the answer (half the context at most)."""
        room = min(room, self.context // 2)
        for first in range(len(history) + 1):
            turns = list(history[first:])
            if len(self._prompt_ids(prompt, turns, system)) + room <= self.context:
                return turns
        return []

    @torch.inference_mode()
    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        statistics: Statistics | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[str]:
        """Yield an answer's text as it is generated; whole characters only.

        Args:
            prompt_ids: see `encode_chat`.
            statistics: is filled in.
            cancel: ends the answer early once it is set.
        """
        statistics = statistics or Statistics()
        statistics.prompt_tokens = len(prompt_ids)
        decoder, stop_text = IncrementalDecoder(self.tokenizer), StopText(self.encoder.template.stop_text)
        limit = min(sampling.max_new_tokens, self.context - len(prompt_ids))
        started = 0.0
        statistics.finish_reason = "length"
        for token_id in self._tokens(prompt_ids, sampling, limit):
            statistics.seconds = time.perf_counter() - started if started else 0.0
            started = started or time.perf_counter()
            statistics.new_tokens += 1
            statistics.token_ids.append(token_id)
            if token_id in self.encoder.stop_ids:
                statistics.finish_reason = "stop"
                break
            if piece := stop_text.push(decoder.push(token_id)):
                yield piece
            if stop_text.found:
                statistics.finish_reason = "stop"
                break
            if cancel is not None and cancel.is_set():
                statistics.finish_reason = "cancelled"
                break
        if piece := stop_text.push(decoder.finish()) + stop_text.finish():
            yield piece

    @torch.inference_mode()
    def log_probabilities(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
        """The log-probabilities of each token of an answer, fp32, [answer_ids, vocab_size], computed in one pass."""
        caches = self._caches(len(prompt_ids) + len(answer_ids))
        ids = torch.tensor([*prompt_ids, *answer_ids][:-1], dtype=torch.int64, device=self.device)
        hidden = self._forward(ids, Segments.of([len(ids)], self.device), caches)
        return logits(self.model, hidden[len(prompt_ids) - 1 :]).log_softmax(dim=-1)

    def _tokens(self, prompt_ids: Sequence[int], sampling: Sampling, limit: int) -> Iterator[int]:
        """The generated ids, one after another."""
        generator = torch.Generator(self.device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        caches = self._caches(len(prompt_ids) + limit)
        seen = torch.zeros(causal_lm(self.model).config.vocab_size, dtype=torch.bool, device=self.device)
        new_ids = torch.tensor(prompt_ids, dtype=torch.int64, device=self.device)
        segments, of_one_token = (Segments.of([count], self.device) for count in (len(new_ids), 1))
        for _position in range(limit):
            seen[new_ids] = True
            hidden = self._forward(new_ids, segments, caches)
            scores = logits(self.model, hidden[-1:])[0].to(self.device)
            new_ids, segments = choose(scores, seen, sampling, generator), of_one_token
            yield int(new_ids)

    def _caches(self, length: int) -> list[KeyValueCache]:
        """Caches with room for so many tokens behind what the adapter puts before all."""
        prefix = learnt_prefix(self.model)
        return [KeyValueCache(prefix[0].length + length, of_layer) for of_layer in prefix]

    def _forward(self, new_ids: torch.Tensor, segments: Segments, caches: list[KeyValueCache]) -> torch.Tensor:
        """The decoder's output for the tokens that follow what the caches hold."""
        first = caches[0].length
        positions = torch.arange(first, first + len(new_ids), device=self.device)
        return forward_hidden(self.model, new_ids, positions, segments, caches)
