"""A model folder as one GGUF file, for llama.cpp and what is built on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from configs.errors import UserError
from configs.messages import _
from configs.results import GgufType
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import messages_of
from ft_datasets.prompt import PromptTemplate, own_template
from ft_datasets.tokenizer import Tokenizer
from utils.files import flush, free_space, replace_durably, write_durably
from utils.model.folder import ModelFolder
from utils.results.gguf_vocabulary import read_vocabulary
from utils.results.modelfile import modelfile, prompt_text
from utils.results.tokenizer_files import UNKNOWN

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""`model_type` of config.json -> what computes the same in llama.cpp."""
ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<EOT>", "[EOS]"),
}
"""Tokens that end an answer in llama.cpp by their names alone."""
MORE_ENDS = ("eot", "eom")
"""What a GGUF file calls the other ends of an answer, beside `eos`; there is no place for more."""
LARGEST_F16 = 65504
GGUF, MODELFILE = "model.gguf", "Modelfile"
"""What a folder gets."""


class GgufFile:
    """A GGUF file to be: what stands in its head is known, and nothing is written yet.

    Attributes:
        size: bytes of its weights.
        modelfile: the text of Ollama's Modelfile.
        notes: what its reader should know.

    Raises:
        UserError: llama.cpp does not compute what this model is, or would read other tokens.
    """

    def __init__(self, folder: ModelFolder, kind: GgufType) -> None:
        from transformers import AutoConfig

        self.folder, self.kind = folder, kind
        self.config: Any = AutoConfig.from_pretrained(folder.path)
        self.architecture = ARCHITECTURES.get(self.config.model_type)
        if self.architecture is None or self.config.hidden_act != "silu":
            raise self._not_computed(f"{self.config.model_type}, {self.config.hidden_act}")
        self.writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[self.architecture])
        self.names = gguf.get_tensor_name_map(self.architecture, self.config.num_hidden_layers)
        self.notes: list[str] = []
        self._add_shape()
        self._add_rotation()
        self.stored = {name: self._add_tensor(name, shape) for name, shape in self._shapes()}
        self._add_tokenizer()
        self.size = sum(tensor.nbytes for tensor in self.writer.tensors[0].values())

    def _not_computed(self, what: str) -> UserError:
        return UserError(
            _("{folder} can't become a GGUF file: llama.cpp has no {what}.", folder=self.folder.path, what=what)
        )

    def _add_shape(self) -> None:
        config, writer = self.config, self.writer
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
        if window and window < context:
            context = window
            self.notes.append(
                _(
                    "The model attends to the last {window} tokens, llama.cpp to all: the answers are the same while "
                    "the context is no longer than that, which model.gguf names as its longest.",
                    window=window,
                )
            )
        writer.add_type("model")
        writer.add_name(self.folder.path.resolve().name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if self.kind == "f32" else f"MOSTLY_{self.kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def _add_rotation(self) -> None:
        rope, writer = self.config.rope_parameters, self.writer
        kind = rope.get("rope_type", "default")
        self.frequency_factors: np.ndarray | None = None
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(self.head_dim)
        usual = {"partial_rotary_factor": 1.0, "attention_factor": None, "beta_fast": 32, "beta_slow": 1}
        usual |= {"mscale": None, "mscale_all_dim": None, "truncate": True}
        unusual = [name for name, value in usual.items() if rope.get(name, value) not in (value, None)]
        if unusual or kind not in ("default", "linear", "yarn", "llama3"):
            raise self._not_computed(f"rope_type {kind} {', '.join(unusual)}".strip())
        if kind == "llama3":
            if self.architecture != gguf.MODEL_ARCH.LLAMA:
                raise self._not_computed(f"rope_type {kind}, {self.config.model_type}")
            self.frequency_factors = self._llama_3_factors()
            name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
            self._add_tensor_info(name, self.frequency_factors.shape, GGMLQuantizationType.F32)
        elif kind != "default":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
            if kind == "yarn":
                writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    def _llama_3_factors(self) -> np.ndarray:
        """By how much Llama 3's scaling slows each of a head's rotations."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _attention = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return (1 / (self.config.rope_parameters["rope_theta"] ** exponents) / scaled).numpy()

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, tensor in self.folder.tensors():  # mapped into memory: nothing is read
            if self.folder.is_weight(name):
                yield name, tuple(tensor.shape)

    def _add_tensor(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Announce a weight; returns how its numbers are stored."""
        gguf_name = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise self._not_computed(name)
        kind = self.kind
        if kind[1] in "45" and gguf_name in ("token_embd.weight", "output.weight"):
            kind = "q8_0"  # what a token is, and which one comes, suffers most from few bits
        stored = GGMLQuantizationType[kind.upper()]
        if len(shape) == 1:
            stored = GGMLQuantizationType.F32
        elif shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = GGMLQuantizationType.F16  # a row is no whole number of blocks
        self._add_tensor_info(gguf_name, shape, stored)
        return stored

    def _add_tensor_info(self, name: str, shape: tuple[int, ...], stored: GGMLQuantizationType) -> None:
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = int(np.prod(shape)) // block * block_bytes
        self.writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=stored)

    def _add_tokenizer(self) -> None:
        writer, path = self.writer, self.folder.path
        tokenizer, vocabulary, source = Tokenizer(path), read_vocabulary(path), own_template(path)
        encoder = ChatEncoder(PromptTemplate("model", source), tokenizer) if source else None
        self.folder.check_vocabulary(len(vocabulary.tokens))
        vocabulary.pad(self.config.vocab_size)
        writer.add_vocab_size(self.config.vocab_size)
        writer.add_tokenizer_model(vocabulary.kind)
        writer.add_tokenizer_pre(vocabulary.splitting)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        if vocabulary.kind == "llama":
            writer.add_token_scores(vocabulary.scores)
        else:
            writer.add_token_merges(vocabulary.merges)
        writer.add_add_space_prefix(vocabulary.adds_space)
        bos = [*tokenizer.bos_ids, self.config.bos_token_id]
        special = {"bos": bos[0], "eos": tokenizer.eos_id, "pad": self.config.pad_token_id}
        if UNKNOWN in vocabulary.types:
            special["unk"] = vocabulary.types.index(UNKNOWN)
        names = dict(enumerate(vocabulary.tokens))
        stops = {end: names[end] for end in sorted(tokenizer.stop_ids) if end in names}
        # Those that llama.cpp knows by their names come last: it knows them even where there is no place for them.
        more = sorted(stops.keys() - {tokenizer.eos_id}, key=lambda end: (stops[end] in ENDS, end))
        unknown = [stops[end] for end in more[len(MORE_ENDS) :] if stops[end] not in ENDS]
        if unknown:
            raise self._not_computed(_("place for so many ends of an answer: {tokens}", tokens=", ".join(unknown)))
        for name, number in [*special.items(), *zip(MORE_ENDS, more, strict=False)]:
            if number in names:  # some models pad with -1
                getattr(writer, f"add_{name}_token_id")(number)
        adds_bos = bool(tokenizer.bos_ids)
        greeting = encoder and prompt_text(encoder, messages_of("a"))
        if greeting and not greeting.startswith(tokenizer.bos_token):
            adds_bos = False  # as transformers asks: a chat template writes BOS itself where the model wants it
        writer.add_add_bos_token(adds_bos)
        writer.add_add_eos_token(False)
        if encoder:
            writer.add_chat_template(encoder.template.source)
        self.modelfile, notes = modelfile(encoder, tokenizer.bos_token if adds_bos else "", stops.values())
        self.notes += notes

    def check_place(self, folder: Path, besides: int = 0) -> None:
        """Refuse a folder that holds such files already, or whose disk is too small.

        Args:
            besides: bytes that something else will have written before.

        Raises:
            UserError: it is so.
        """
        for file in (folder / GGUF, folder / MODELFILE):
            if file.exists():
                raise UserError(_("{file} is there already. Give another --output_dir, or remove it.", file=file))
        free = free_space(folder)
        if free < self.size + besides:
            raise UserError(
                _(
                    "{needed} GB are needed, and the disk of {folder} has {free} GB left.",
                    needed=f"{(self.size + besides) / 1e9:.1f}",
                    folder=folder,
                    free=f"{free / 1e9:.1f}",
                )
            )

    def write(self, folder: Path) -> None:
        """Write model.gguf and the Modelfile into a folder; each appears whole or not at all.

        One tensor at a time is in memory.

        Raises:
            UserError: see `check_place`; or the disk can't be written, or a number is too large for the type.
        """
        self.check_place(folder)
        unfinished = folder / f"{GGUF}.unfinished"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._write(unfinished)
                flush(unfinished)
                write_durably(folder / MODELFILE, self.modelfile)
                replace_durably(unfinished, folder / GGUF)
            finally:
                self.writer.close()
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            told = error.strerror or error  # NumPy says of a full disk only how many numbers it has written
            raise UserError(_("{folder} can't be written ({error}).", folder=folder, error=told)) from error

    def _write(self, file: Path) -> None:
        self.writer.write_header_to_file(file)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        if self.frequency_factors is not None:
            self.writer.write_tensor_data(self.frequency_factors)
        for name, tensor in self.folder.tensors():
            if name in self.stored:
                self.writer.write_tensor_data(self._numbers(name, tensor.float()))
        self.writer.close()

    def _numbers(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        """A weight's bytes, laid out as llama.cpp wants them."""
        stored = self.stored[name]
        if stored == GGMLQuantizationType.F16 and tensor.abs().max() > LARGEST_F16:
            raise UserError(
                _(
                    "{name} has numbers that are too large for 16-bit floats. Take another type: --gguf_type bf16",
                    name=name,
                )
            )
        if self.architecture == gguf.MODEL_ARCH.LLAMA and name.split(".")[-2] in ("q_proj", "k_proj"):
            # Numbers that are rotated together lie half a head apart here, and side by side there.
            heads = tensor.shape[0] // self.head_dim
            halves = tensor.view(heads, 2, self.head_dim // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return gguf.quants.quantize(tensor.contiguous().numpy(), stored)
