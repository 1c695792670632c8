"""Training in the test's own process."""

import contextlib
from pathlib import Path


def made_up_examples() -> list:
    """Eight examples of different lengths, of random tokens."""
    import numpy as np

    from ft_datasets.examples import Example

    chooser = np.random.default_rng(0)
    made_up = []
    for number, length in enumerate((9, 30, 17, 12, 40, 8, 25, 14), 1):
        ids = [1, *chooser.integers(260, 600, length - 2), 2]
        made_up.append(Example(number, "", np.array(ids, dtype=np.int32), learnt=((length // 3, length),)))
    return made_up


def make_trainer(model_folder: Path, output: Path, data: Path | None = None, checkpoint=None, **settings):
    """A trainer in this process, on the CPU in fp32, ready to run; settings as on the command line.

    Without `data`, the examples are eight made-up ones, none of them held out.
    """
    import torch

    from configs.training import TrainingConfig
    from ft_datasets.loading import Data, load_data
    from helpers.records import alpaca_encoder
    from utils.machine.world import World
    from utils.model.adapters import trainable_parameters
    from utils.model.folder import ModelFolder
    from utils.rows.schedule import Schedule
    from utils.runs.start import Start
    from utils.training.fitting import Fitted, fit
    from utils.training.optimizer import make_optimizer
    from utils.training.setup import Setup
    from utils.training.trainable import load_trainable
    from utils.training.trainer import Trainer

    settings = {"use_peft": True, "val_set_size": 0, "save_minutes": 0, "scheduler": "constant", **settings}
    config = TrainingConfig(model_name=str(model_folder), output_dir=str(output), **settings)
    output.mkdir(parents=True, exist_ok=True)
    if data is not None:
        config.alpaca_dataset.data_path = str(data)
        examples = load_data(config, alpaca_encoder(model_folder), report=lambda _message: None)
    else:
        examples = Data(made_up_examples(), [])
    folder, world = ModelFolder(model_folder), World(0, 1, [torch.device("cpu")])
    schedule = Schedule(
        len(examples.training), config.batch_size_training, config.num_epochs, config.max_steps, config.seed
    )
    setup = Setup.of(config, folder.config, world, examples, schedule, checkpoint.step if checkpoint else 0)
    module = load_trainable(config, setup, folder)
    optimizer = make_optimizer(trainable_parameters(module.model).values(), config)
    earlier = Fitted.of_checkpoint(checkpoint) if checkpoint else None
    fitted = fit(config, setup, module, optimizer, examples.training, earlier)
    start = Start(schedule, {}, checkpoint, False, [])
    trainer = Trainer(config, setup, module, optimizer, examples, start, fitted)
    if checkpoint:
        trainer.resume(checkpoint)
    return trainer


def train(trainer) -> list[float]:
    """Run a trainer to its end; the loss of every step."""
    from utils.runs.metrics import Metrics, read_metrics

    output = Path(trainer.config.output_dir)
    with contextlib.closing(Metrics(output, True, trainer.done)) as metrics:
        trainer.run(metrics)
    return [line["train_loss"] for line in read_metrics(output) if "train_loss" in line]


def save_adapter(trainer) -> Path:
    """Save a trainer's adapter in its output folder, as PEFT has it."""
    from utils.training.sharding import whole_tensors

    trainer.model.save_pretrained(trainer.config.output_dir, state_dict=dict(whole_tensors(trainer.parameters)))
    return Path(trainer.config.output_dir)


def project_logits(model, input_ids: list[int]):
    """The project's own forward pass over one sequence: fp32, shape [length, vocabulary]."""
    import torch

    from utils.model.adapters import learnt_prefix
    from utils.model.decoder import forward_hidden, logits

    ids, prefix = torch.tensor(input_ids), learnt_prefix(model)
    positions = torch.arange(len(ids)) + prefix[0].length
    with torch.no_grad():
        return logits(model, forward_hidden(model, ids, positions, pasts=prefix))
