"""The command line as a person or a script types it, against hand-written expectations."""

import pytest

from configs.command_line import parse, usage
from configs.errors import UserError
from configs.results import MergeConfig
from configs.serving import ApiConfig, ChatConfig
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
        (["--quantization", "5bit"], "--quantization 5bit: expected one of 8bit, 4bit"),
        (["--dataset", "samsum"], "--dataset samsum: expected one of alpaca_dataset"),
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


def test_bytes_that_are_no_text_are_refused():
    assert "not UTF-8" in complaint(ChatConfig, "--prompt", b"\xc4\xe3".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("config_class", [TrainingConfig, ChatConfig, ApiConfig, MergeConfig])
def test_help_says_what_every_flag_means(config_class, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config_class, ["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    flags = [number for number, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) >= 4
    for number in flags:
        assert lines[number + 1].startswith("      "), f"no meaning beneath {lines[number]}"
