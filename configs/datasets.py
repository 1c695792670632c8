"""Settings of the data sets."""

from dataclasses import dataclass


@dataclass
class AlpacaDataset:
    """A JSON list of {"instruction", "input", "output"}."""

    data_path: str = "ft_datasets/alpaca_data.json"
    """The JSON file; a relative path counts from where you stand."""
