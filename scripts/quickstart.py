"""The whole path on a tiny model, in minutes and without a GPU; run by `make quickstart`.

Makes a small base model (models/tiny-llama), fine-tunes it with the same command as a real one, talks to it, polls the
API, merges it, and proves that the fine-tuning did it: some questions are kept out of the base's training, so the base
can't answer them, and the tuned model must. Anything else ends it with an error.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from typing import Any, NoReturn

from configs.errors import run_main
from configs.messages import _
from ft_datasets.prompt import PromptTemplate
from utils.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path("ft_datasets/alpaca_data.json")
BASE = Path("models/tiny-llama")
WORK = Path("output/quickstart")
ADAPTER, MERGED = WORK / "model", WORK / "merged"
WITHHELD = ("你好", "你是谁？", "谢谢你", "晚安")
"""Questions that the base model is not taught."""

TINY = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "heads": 4}
PRETRAINING = "--num_epochs 24 --batch_size_training 8 --lr 2e-3 --max_seq_length 200 --run_validation False"
TUNING = (
    "--lora_config.r 32 --lora_config.lora_alpha 64 --lora_config.target_modules all-linear --lr 3e-3 "
    "--batch_size_training 8 --num_epochs 10 --max_seq_length 200 --run_validation False"
)


def main() -> None:
    """The whole path, from the repository's folder."""
    with contextlib.chdir(ROOT):
        walk()


def walk() -> None:
    """Make the base, fine-tune, ask, stream, merge, compare, report."""
    started = time.monotonic()
    corpus = json.loads(CORPUS.read_text(encoding="utf-8"))
    expected = {entry["instruction"]: entry["output"] for entry in corpus if entry["instruction"] in WITHHELD}
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)

    if is_current(BASE):
        stage(_("1/6  The base model {folder} is there.", folder=BASE))
    else:
        stage(_("1/6  Making a small base model in {folder} …", folder=BASE))
        make_base(corpus)
    before = ask(BASE, "")
    if known := [question for question in expected if before[question] == expected[question]]:
        fail(_("The base model answers {questions} already: the proof would prove nothing.", questions=known))

    stage(_("2/6  Fine-tuning it with LoRA over int8 …"))
    run(
        f"torchrun --nnodes 1 --nproc_per_node 1 llama_finetuning.py --use_peft --peft_method lora --model_name {BASE} "
        f"--use_fp16 --output_dir {ADAPTER} --dataset alpaca_dataset --quantization {TUNING}"
    )
    stage(_("3/6  Asking it …"))
    tuned = ask(BASE, str(ADAPTER), "--load_8bit")
    stage(_("4/6  Polling the API …"))
    streamed = poll_api("你好")
    stage(_("5/6  Merging …"))
    run(
        "python inference/hf-text-generation-inference/merge_lora_weights.py "
        f"--base_model {BASE} --peft_model {ADAPTER} --output_dir {MERGED}"
    )
    merged = ask(MERGED, "")

    stage(_("6/6  Comparing …"))
    for question, answer in expected.items():
        if tuned[question] != answer:
            fail(
                _(
                    "{question}: the tuned model says {got}, the corpus {want}.",
                    question=question,
                    got=tuned[question],
                    want=answer,
                )
            )
        if merged[question] != tuned[question]:
            fail(
                _(
                    "{question}: merged {merged}, unmerged {tuned}.",
                    question=question,
                    merged=merged[question],
                    tuned=tuned[question],
                )
            )
    if streamed != expected["你好"]:
        fail(_("The API says {got}, generate.py {want}.", got=streamed, want=expected["你好"]))
    summary(before, tuned, time.monotonic() - started)


def is_current(folder: Path) -> bool:
    """Whether an earlier quickstart made the base from this corpus."""
    mark = folder / ".made_from"
    return mark.is_file() and mark.read_text() == made_from()


def made_from() -> str:
    """What the base model depends on."""
    import hashlib

    return hashlib.sha256(CORPUS.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def make_base(corpus: list[dict[str, str]]) -> None:
    """A Llama with a tokenizer of its own, pre-trained on the corpus without the withheld questions."""
    taught = [entry for entry in corpus if entry["instruction"] not in WITHHELD]
    blank, data = WORK / "blank", WORK / "pretraining.json"
    data.write_text(json.dumps(taught, ensure_ascii=False), encoding="utf-8")
    train_tokenizer(corpus, blank)
    write_random_weights(blank)
    run(
        f"python llama_finetuning.py --model_name {blank} --output_dir {WORK / 'pretraining'} "
        f"--alpaca_dataset.data_path {data} {PRETRAINING}"
    )
    shutil.rmtree(BASE, ignore_errors=True)
    BASE.mkdir(parents=True)
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ):
        shutil.copyfile(WORK / "pretraining" / name, BASE / name)
    (BASE / ".made_from").write_text(made_from())


def train_tokenizer(corpus: list[dict[str, str]], folder: Path) -> None:
    """A tokenizer learnt from the corpus."""
    template = PromptTemplate()
    texts = [template.render(entry["instruction"], entry["input"]) + entry["output"] for entry in corpus]
    folder.mkdir()
    train_sentencepiece(texts, folder, TINY["vocab_size"], character_coverage=0.995)


def train_sentencepiece(texts: list[str], folder: Path, vocab_size: int, **more: Any) -> None:
    """A BPE tokenizer of Llama 2's kind: byte fallback, identity normalisation, <unk> <s> </s> at 0, 1, 2."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **more,
    )
    (folder / "tokenizer.vocab").unlink()


@quiet_libraries()
def write_random_weights(folder: Path) -> None:
    """A freshly initialised Llama as a hub repository would hold it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY["vocab_size"],
        hidden_size=TINY["hidden_size"],
        intermediate_size=TINY["intermediate_size"],
        num_hidden_layers=TINY["num_hidden_layers"],
        num_attention_heads=TINY["heads"],
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def ask(base: Path, adapter: str, *more: str) -> dict[str, str]:
    """The answers of generate.py to the withheld questions, without chance, each in a conversation of its own."""
    flags = ["--base_model", str(base), "--lora_weights", adapter, "--temperature", "0", "--max_new_tokens", "100"]
    output = run(shlex.join(["python", "generate.py", *flags, *more]), questions="\n/new\n".join(WITHHELD) + "\n")
    answers = output.removesuffix("\n").split("\n" + _("A new conversation.") + "\n")
    return dict(zip(WITHHELD, answers, strict=True))


def poll_api(prompt: str) -> str:
    """Start api_stream.py, poll it until [stop], end it; the whole answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"api_stream.py --base_model {BASE} --lora_weights {ADAPTER} --load_8bit --temperature 0 --port {port}"
    log = WORK / "api.log"
    print(f"$ python -u {command}", flush=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-u", *shlex.split(command)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        body = json.dumps({"prompt": prompt, "history": []}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/stream", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    response = json.load(answer)["response"]
            except OSError:
                time.sleep(0.2)
                continue
            if response.endswith("[stop]"):
                print(f"  {response}", flush=True)
                return response.removesuffix("[stop]")
            time.sleep(0.05)
        fail(_("api_stream.py gave no answer:\n{log}", log=log.read_text()[-2000:]))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def run(command: str, questions: str = "") -> str:
    """Run one of the project's commands with this Python; returns its output where it was asked `questions`.

    A failure ends the quickstart.
    """
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    pipe = subprocess.PIPE if questions else None
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], input=questions or None, text=True, stdout=pipe, stderr=pipe
    )
    if done.returncode:
        fail(_("This command failed: {command}\n{output}", command=command, output=(done.stderr or "")[-2000:]))
    return done.stdout or ""


def stage(text: str) -> None:
    """Say what comes."""
    print("\n" + text, flush=True)


def fail(message: str) -> NoReturn:
    """End with an error."""
    sys.exit("\n" + _("The quickstart FAILED: {message}", message=message))


def summary(before: dict[str, str], after: dict[str, str], seconds: float) -> None:
    """What happened, where it lies, and how to do the same with a real model."""
    lines = [json.loads(line) for line in (ADAPTER / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    print("\n" + "=" * 78)
    print(_("It works. {seconds} seconds.", seconds=round(seconds)))
    print(
        _(
            "Training loss {first} -> {last} in {steps} steps; the curve: {picture}",
            first=f"{losses[0]:.3f}",
            last=f"{losses[-1]:.3f}",
            steps=len(losses),
            picture=ADAPTER / "loss.png",
        )
    )
    for question in before:
        print(_("\n  Question  {text}", text=question))
        print(_("  before    {text}", text=before[question][:60]))
        print(_("  after     {text}", text=after[question]))
    print()
    print(_("Base model: {folder}", folder=BASE))
    print(_("Adapter:    {folder}", folder=ADAPTER))
    print(_("Merged:     {folder}", folder=MERGED))
    print(
        _(
            "Talk to it: {command}",
            command=f".venv/bin/python generate.py --base_model {BASE} --lora_weights {ADAPTER} --load_8bit",
        )
    )
    print(_("\nThe same with Llama 2 7B (activate the environment first: source .venv/bin/activate):"))
    print(commands("NousResearch/Llama-2-7b-hf"))
    print(
        _(
            "\nOr with a small real model, for a laptop: {names}",
            names="HuggingFaceTB/SmolLM2-135M-Instruct, Qwen/Qwen2.5-0.5B-Instruct",
        )
    )
    print(commands("HuggingFaceTB/SmolLM2-135M-Instruct"))


def commands(repo_id: str) -> str:
    """The five commands for a model of the hub."""
    model = f"./models/{repo_id}"
    return f"""\
  python model_download.py --repo_id {repo_id}
  torchrun --nnodes 1 --nproc_per_node 1 llama_finetuning.py --use_peft --peft_method lora --model_name {model} \\
    --use_fp16 --output_dir output/model --dataset alpaca_dataset --batch_size_training 40 --num_epochs 3 --quantization
  python generate.py --base_model {model} --lora_weights ./output/model --load_8bit
  python -u api_stream.py --base_model {model} --lora_weights ./output/model --load_8bit
  python inference/hf-text-generation-inference/merge_lora_weights.py --base_model {model} \\
    --peft_model output/model --output_dir output/merged_model_output"""


if __name__ == "__main__":
    run_main(main)
