"""The command line as a person or a script types it, and calls from Python, against hand-written expectations."""

from pathlib import Path

import pytest

from configs.command_line import call, configure, parse, usage
from configs.download import DownloadConfig
from configs.errors import UserError
from configs.results import MergeConfig
from configs.serving import ApiConfig, ChatConfig
from configs.serving_check import ServingCheckConfig
from configs.training import TrainingConfig

LLAMA_RECIPES_FLAGS = (
    "enable_fsdp run_validation batch_size_training num_epochs num_workers_dataloader lr weight_decay gamma seed "
    "use_fp16 mixed_precision val_batch_size dataset micro_batch_size peft_method use_peft output_dir freeze_layers "
    "num_freeze_layers quantization one_gpu save_model dist_checkpoint_root_folder dist_checkpoint_folder "
    "save_optimizer model_name lora_config.r lora_config.lora_alpha lora_config.target_modules "
    "lora_config.lora_dropout alpaca_dataset.data_path fsdp_config.sharding_strategy fsdp_config.sharding_group_size "
    "fsdp_config.fsdp_activation_checkpointing fsdp_config.fsdp_cpu_offload"
).split()


def complaint(config_class, *argv: str) -> str:
    """What is said about a command line that can't be used."""
    with pytest.raises(UserError) as caught:
        parse(config_class, list(argv))
    return str(caught.value)


def test_the_fine_tuning_command_as_documented():
    config = parse(
        TrainingConfig,
        "--use_peft --peft_method lora --model_name ./models/NousResearch/Llama-2-7b-hf --use_fp16 "
        "--output_dir output/model --dataset alpaca_dataset --batch_size_training 40 --num_epochs 3 "
        "--quantization".split(),
    )
    chosen = (config.use_peft, config.peft_method, config.use_fp16, config.quantization)
    assert chosen == (True, "lora", True, "8bit")
    assert (config.batch_size_training, config.num_epochs) == (40, 3)
    assert config.lora_config.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", LLAMA_RECIPES_FLAGS)
def test_the_names_of_llama_recipes_are_kept(name):
    assert f"  --{name} " in usage(TrainingConfig)


@pytest.mark.parametrize(
    "text",
    ["2024", "1e5", "None", "true", "[你好]", "你好, 世界", "a # b", "--你好", "--seed", "--help", "-h", "", " a=b "],
)
def test_any_text_is_a_prompt(text):
    for argv in (["--prompt", text, "--top_k", "3"], ["--top_k", "3", f"--prompt={text}"]):
        config = parse(ChatConfig, argv)
        assert (config.prompt, config.top_k) == (text, 3)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--quantization"], "8bit"),
        (["--quantization", "--seed", "1"], "8bit"),
        (["--quantization", "4bit"], "4bit"),
        (["--quantization=nf4"], "4bit"),
        (["--quantization", "int8"], "8bit"),
        (["--quantization", "False"], None),
        ([], None),
    ],
)
def test_quantization_alone_means_int8(argv, expected):
    assert parse(TrainingConfig, ["--use_peft", *argv]).quantization == expected


@pytest.mark.parametrize("text", ["[q_proj,k_proj]", "q_proj,k_proj", "['q_proj', \"k_proj\"]", "(q_proj, k_proj)"])
def test_lists(text):
    assert parse(TrainingConfig, ["--use_peft", "--lora_config.target_modules", text]).lora_config.target_modules == [
        "q_proj",
        "k_proj",
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--use_peft"], True),
        (["--use_peft", "False"], False),
        (["--use_peft=yes"], True),
        (["--use-peft", "--lr", "1"], True),
    ],
)
def test_switches(argv, expected):
    assert parse(TrainingConfig, argv).use_peft is expected


def test_dotted_flags_reach_their_part_and_the_last_one_counts():
    config = parse(
        TrainingConfig, "--use_peft --lora_config.r 4 --lora_config.r 16 --alpaca_dataset.data_path my.json".split()
    )
    assert (config.lora_config.r, config.alpaca_dataset.data_path) == (16, "my.json")
    assert TrainingConfig().lora_config.r == 8


def test_an_empty_value_is_a_value():
    assert parse(ChatConfig, ["--lora_weights", ""]).lora_weights == ""


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["--batch_size_trainig", "4"], "--batch_size_training"),
        (["--batchsize_training", "4"], "--batch_size_training"),
        (["--epochs", "3"], "--num_epochs"),
        (["--lora_config.rank", "8"], "--lora_config.r"),
        (["--alpaca_dataset.datapath", "x"], "--alpaca_dataset.data_path"),
        (["--lora.r", "8"], "--lora_config.r"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv, near):
    message = complaint(TrainingConfig, *argv)
    assert f"unknown flag {argv[0]}; did you mean {near}?" in message.split("\n")
    assert argv[1] not in message.split("\n"), "the unknown flag's value is not a problem of its own"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--num_epochs", "many"], "--num_epochs many: expected a whole number"),
        (["--num_epochs", "2.5"], "--num_epochs 2.5: expected a whole number"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--lr", "nan"], "--lr nan: expected a number"),
        (["--lr", "inf"], "--lr inf: expected a number"),
        (["--use_peft", "maybe"], "--use_peft maybe: expected true or false"),
        (["--use_peft="], "--use_peft : expected true or false"),
        (["--quantization", "5bit"], "--quantization 5bit: expected one of 8bit, 4bit"),
        (["--dataset", "samsum"], "--dataset samsum: expected one of alpaca_dataset, chat_dataset, custom_dataset"),
        (["--lora_config.r", "[8]"], "--lora_config.r [8]: expected a whole number"),
        (["--output_dir"], "--output_dir needs a value"),
        (["--output_dir", "--seed", "3"], "--output_dir needs a value"),
        (["--output_dir", "--sed"], "--output_dir needs a value"),
        (["output"], "unexpected `output`: a value must follow its flag"),
        (["-seed", "3"], "unexpected `-seed`: a value must follow its flag"),
    ],
)
def test_values_of_the_wrong_type(argv, expected):
    assert expected in complaint(TrainingConfig, *argv).split("\n")


@pytest.mark.parametrize(
    "argv",
    [
        "--batch_size_training 0",
        "--micro_batch_size -1",
        "--num_epochs 0",
        "--max_seq_length 7",
        "--lr -1e-4",
        "--gamma 0 --scheduler step",
        "--gradient_clipping_threshold 0",
        "--warmup_ratio 1.5",
        "--val_set_size -0.1",
        "--seed -1",
        f"--seed {2**64}",
        "--keep_checkpoints 0",
        "--lora_config.r 0 --use_peft",
        "--lora_config.lora_dropout 1 --use_peft",
        "--lora_config.target_modules [] --use_peft",
        "--llama_adapter_config.adapter_len 0 --use_peft --peft_method llama_adapter",
        "--prefix_config.num_virtual_tokens 0 --use_peft --peft_method prefix",
    ],
)
def test_training_values_out_of_range_are_named(argv):
    message = complaint(TrainingConfig, *argv.split())
    assert len(message.split("\n")) == 2
    assert argv.split()[0] in message


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        ("--peft_method prefix", "--use_peft"),
        ("--lora_config.r 4", "--use_peft --peft_method lora"),
        ("--use_peft --peft_method prefix --lora_config.modules_to_save lm_head", "--use_peft --peft_method lora"),
        ("--use_peft --prefix_config.num_virtual_tokens 4", "--use_peft --peft_method prefix"),
        ("--from_adapter folder", "--use_peft --peft_method lora"),
        ("--run_validation False --val_set_size 5", "--run_validation"),
        ("--gamma 0.5", "--scheduler step"),
        ("--warmup_ratio 0.1 --scheduler constant", "--scheduler cosine"),
        ("--num_freeze_layers 2", "--freeze_layers"),
        ("--fsdp_config.fsdp_cpu_offload", "--enable_fsdp"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_refused(argv, needed):
    assert complaint(TrainingConfig, *argv.split()).split("\n")[0].endswith(f"has an effect only with {needed}")


@pytest.mark.parametrize(
    "argv",
    [
        "--temperature -0.1",
        "--temperature nan",
        "--top_p 0",
        "--top_p 1.1",
        "--top_k -1",
        "--repetition_penalty 0",
        "--max_new_tokens 0",
        "--seed -1",
    ],
)
def test_sampling_values_out_of_range_are_named(argv):
    for config_class in (ChatConfig, ApiConfig):
        assert complaint(config_class, *argv.split()).startswith(argv.split()[0])


def test_other_values_out_of_range_are_named():
    assert "--port 65536" in complaint(ApiConfig, "--port", "65536")
    assert "--shard_gb 0" in complaint(MergeConfig, "--shard_gb", "0")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--quantization", ["--quantization 8bit", "add --use_peft"]),
        ("--quantization 4bit --use_peft --peft_method llama_adapter", ["llama_adapter", "--peft_method lora"]),
        ("--use_peft --freeze_layers", ["--freeze_layers", "frozen already"]),
        ("--use_fp16 --mixed_precision False", ["--use_fp16", "--mixed_precision False"]),
        ("--use_peft --peft_method prefix --enable_fsdp", ["--enable_fsdp", "--peft_method lora"]),
        ("--use_peft --lora_config.use_dora true --enable_fsdp", ["--lora_config.use_dora", "--enable_fsdp"]),
        ("--enable_fsdp --fsdp_config.sharding_strategy NO_SHARD", ["NO_SHARD", "FULL_SHARD", "HYBRID_SHARD"]),
        ("--enable_fsdp --fsdp_config.sharding_group_size 2", ["sharding_group_size", "HYBRID_SHARD"]),
        (
            "--enable_fsdp --fsdp_config.sharding_strategy HYBRID_SHARD --fsdp_config.sharding_group_size -2",
            ["at least 0"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_way_out(argv, words):
    message = complaint(TrainingConfig, *argv.split())
    assert len(message.split("\n")) == 2
    assert all(word in message for word in words)


def test_two_ways_to_hold_the_base_exclude_each_other():
    for config_class in (ChatConfig, ApiConfig):
        assert "--load_8bit and --load_4bit" in complaint(config_class, "--load_8bit", "--load_4bit")


def test_all_problems_are_told_at_once():
    message = complaint(
        TrainingConfig,
        "--bogus",
        "1",
        "--num_epochs",
        "many",
        "--use_peft",
        "perhaps",
        "stray",
        "--lora_config.rr",
        "2",
    )
    assert [line.split(":")[0].split(";")[0] for line in message.split("\n")] == [
        "unknown flag --bogus",
        "unexpected `stray`",
        "unknown flag --lora_config.rr",
        "--num_epochs many",
        "--use_peft perhaps",
        "`--help` lists every flag.",
    ]
    message = complaint(TrainingConfig, *"--lr -1 --seed -1 --lora_config.r 0 --quantization".split())
    assert all(name in message for name in ("--lr", "--seed", "--lora_config.r", "--quantization"))


def test_what_a_server_is_compared_with_is_checked_before_anything_is_loaded(monkeypatch):
    said = complaint(ServingCheckConfig, "--endpoint", "localhost:8000", "--timeout", "0", "--tolerance", "-1")
    assert all(part in said for part in ("--endpoint localhost:8000", "--timeout 0.0", "--tolerance -1.0"))
    for address in ("", "http://", "http://[::1", "http://a:99999", "ftp://a"):
        assert "--endpoint" in complaint(ServingCheckConfig, "--endpoint", address)
    assert "no such folder" in complaint(ServingCheckConfig, "--endpoint", "http://a", "--report", "/no/where/r.json")
    assert "--api_key" in complaint(ServingCheckConfig, "--endpoint", "http://a", "--api_key", "密钥")
    monkeypatch.setenv("OPENAI_API_KEY", "from outside\n")
    assert parse(ServingCheckConfig, ["--endpoint", "http://a"]).key == "from outside"
    assert parse(ServingCheckConfig, ["--endpoint", "http://a", "--api_key", "given"]).key == "given"


def test_bytes_that_are_no_text_are_refused():
    assert "not UTF-8" in complaint(ChatConfig, "--prompt", b"\xc4\xe3".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("config_class", [TrainingConfig, ChatConfig, ApiConfig, MergeConfig, ServingCheckConfig])
def test_help_says_what_every_flag_means(config_class, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config_class, ["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    flags = [number for number, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) >= 4
    for number in flags:
        assert lines[number + 1].startswith("      "), f"no meaning beneath {lines[number]}"


# Calls that fire makes


class Called:
    """Stands in for a command's main, and keeps what it was called with."""

    def __init__(self, config_class) -> None:
        self.config_class, self.settings, self.times = config_class, {}, 0

    def by(self, *argv: str):
        """The configuration that a command line leads to, by way of fire."""

        def main(**settings):
            self.settings, self.times = settings, self.times + 1
            return ["a result", main]

        returned = call(main, self.config_class, list(argv))
        assert returned == ["a result", main]
        return configure(self.config_class, self.settings)


@pytest.mark.parametrize(
    "text",
    [
        *["--你好", "--你好=再见", "--", "---", "-", "-x", "--help", "-h", "--nothing", "--trace", "--interactive"],
        *["2024", "1e5", "None", "true", "[你好]", "你好, 世界", "{1: 2}", "a # b", "'a'", '"', "\\n"],
        *["", " ", " a=b ", "=", "一行\n又一行\n", "a\t--top_k 3", "\u2028"],
    ],
)
def test_fire_hands_any_prompt_on_and_says_nothing(text, capsys):
    called = Called(ChatConfig)
    for argv in (["--prompt", text, "--top_k", "3"], [f"--prompt={text}", "--top-k=3"]):
        config = called.by(*argv)
        assert called.settings == {"prompt": text, "top_k": "3"}
        assert (config.prompt, config.top_k) == (text, 3)
    assert called.times == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--include", "*.json", "--include", "a,b", "--exclude=c"], (["*.json", "a", "b"], ["c"])),
        (["--include", "['(a', 'b)']"], (["(a", "b)"], [])),
        (["--include", "x"], (["x"], [])),
    ],
)
def test_fire_hands_lists_on_whole(argv, expected):
    config = Called(DownloadConfig).by("--repo_id", "owner/name", *argv)
    assert (config.include, config.exclude) == expected


def test_fire_hands_switches_numbers_and_dotted_flags_on():
    config = Called(TrainingConfig).by(
        *"--use_peft --mixed_precision false --run-validation no --lr 1e-5 --lora_config.r 4 --quantization".split(),
        *"--lora_config.target_modules [] --lora_config.target_modules q_proj --lora_config.r 16".split(),
    )
    assert (config.use_peft, config.mixed_precision, config.run_validation) == (True, False, False)
    assert (config.lr, config.lora_config.r, config.quantization) == (1e-5, 16, "8bit")
    assert config.lora_config.target_modules == ["q_proj"]
    assert Called(TrainingConfig).by() == TrainingConfig()


@pytest.mark.parametrize("argv", [["--normalize"], ["--nouse_peft"], ["stray"], ["-"], ["--"], ["--", "--trace"]])
def test_what_fire_would_let_pass_never_reaches_it(argv):
    called = Called(TrainingConfig)
    with pytest.raises(UserError):
        called.by(*argv)
    assert called.times == 0


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_ours(flag, capsys):
    called = Called(ChatConfig)
    with pytest.raises(SystemExit) as caught:
        called.by("--top_k", "3", flag)
    assert (caught.value.code, called.times) == (0, 0)
    assert capsys.readouterr() == (usage(ChatConfig) + "\n", "")


# Calls from Python


def test_a_call_takes_values_and_the_texts_of_the_command_line_alike():
    typed = {"use_peft": True, "lr": 1e-5, "max_steps": 3, "output_dir": Path("a b"), "quantization": "4bit"}
    typed |= {"lora_config.r": 16, "lora_config.target_modules": ["q_proj", "k_proj"], "torch_compile": None}
    texts = {"use_peft": "yes", "lr": "1e-5", "max_steps": "3", "output_dir": "a b", "quantization": "nf4"}
    texts |= {"lora_config.r": "16", "lora_config.target_modules": "[q_proj,k_proj]"}
    argv = "--use_peft --lr 1e-5 --max_steps 3 --quantization 4bit --lora_config.r 16 --output_dir".split()
    argv += ["a b", "--lora_config.target_modules", "q_proj,k_proj"]
    assert configure(TrainingConfig, typed) == configure(TrainingConfig, texts) == parse(TrainingConfig, argv)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, "8bit"), (8, "8bit"), ("int8", "8bit"), (4, "4bit"), ("4bit", "4bit"), (False, None), (None, None)],
)
def test_quantization_in_a_call(value, expected):
    assert configure(TrainingConfig, {"use_peft": True, "quantization": value}).quantization == expected


@pytest.mark.parametrize("text", ["--help", "", "None", "[你好]", "-", "a=b\n"])
def test_a_prompt_in_a_call_is_what_it_is(text):
    assert configure(ChatConfig, {"prompt": text}).prompt == text


def test_a_list_in_a_call_is_what_it_is():
    include = ["[ab]*.json", "a,b", " c"]
    assert configure(DownloadConfig, {"repo_id": "o/n", "include": include}).include == include


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_epochs": 2.5}, "--num_epochs 2.5: expected a whole number"),
        ({"num_epochs": True}, "--num_epochs True: expected a whole number"),
        ({"num_epochs": None}, "--num_epochs None: expected a whole number"),
        ({"num_epochs": [3]}, "--num_epochs [3]: expected a whole number"),
        ({"lr": float("nan")}, "--lr nan: expected a number"),
        ({"use_peft": 2}, "--use_peft 2: expected true or false"),
        ({"use_peft": None}, "--use_peft None: expected true or false"),
        ({"quantization": 5}, "--quantization 5: expected one of 8bit, 4bit"),
        ({"output_dir": None}, "--output_dir None: expected text"),
        ({"output_dir": ["a"]}, "--output_dir ['a']: expected text"),
        ({"lora_config.target_modules": 3}, "--lora_config.target_modules 3: expected a list of texts"),
        ({"lora_config.target_modules": [3]}, "--lora_config.target_modules [3]: expected a list of texts"),
        ({"lora_config": {"r": 16}}, "unknown flag --lora_config; did you mean --lora_config.r?"),
        ({"batch_size": 4}, "unknown flag --batch_size; did you mean --val_batch_size?"),
        ({"help": True}, "unknown flag --help; did you mean --scheduler?"),
    ],
)
def test_wrong_values_in_a_call(settings, expected):
    with pytest.raises(UserError) as caught:
        configure(TrainingConfig, settings)
    assert str(caught.value).split("\n")[0] == expected


def test_a_call_is_refused_in_the_words_of_the_command_line_with_all_problems_at_once():
    settings = {"bogus": 1, "num_epochs": "many", "lr": -1, "use_peft": "perhaps", "seed": -1, "lora_config.rr": 2}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with pytest.raises(UserError) as caught:
        configure(TrainingConfig, settings)
    assert str(caught.value) == complaint(TrainingConfig, *argv)
    assert len(str(caught.value).split("\n")) == 7


def test_half_a_character_in_a_call_is_refused():
    for settings in ({"prompt": "\ud800"}, {"\udc80": 1}, {"base_model": Path("\udc80")}):
        with pytest.raises(UserError, match="not UTF-8"):
            configure(ChatConfig, settings)
