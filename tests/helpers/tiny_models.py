"""Small models of Llama's kind and their tokenizers, made here, so that nothing is downloaded."""

from pathlib import Path

from scripts.quickstart import train_sentencepiece

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n你好，请介绍一下你自己。\n\n### Input:\n今天天气很好\n\n### Response:\n",
    "我们一起去公园散步，好不好？人工智能可以回答问题、翻译句子、写短文。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。 2024 年 3 月 15 日，气温 21.5 ℃。",
    "The quick brown fox jumps over the lazy dog. for i in range(10): print(i)",
] * 20


def make_model(
    folder: Path,
    *,
    layers: int = 2,
    seed: int = 0,
    kv_heads: int = 4,
    dtype: str = "float32",
    family: str = "llama",
    head_dim: int = 16,
    random_vectors: bool = False,
    positions: int = 512,
    **more,
) -> Path:
    """A small random model of Llama's kind with its tokenizer, as a hub repository would hold it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random, but with enough contrast that greedy answers differ from prompt to prompt
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif random_vectors:  # norms and biases
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    train_sentencepiece(TEXTS, folder, vocab_size=600)
    return folder


def write_tokenizer_json(model_file: Path, folder: Path) -> Path:
    """A SentencePiece model as a hub repository's tokenizer.json holds it, in a new `folder`, which it returns."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    splits = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    merges.sort(key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    fast = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    return folder
