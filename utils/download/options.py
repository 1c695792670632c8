"""How files are fetched: what the command line says, and what only tests change."""

from dataclasses import dataclass

from configs.download import DownloadConfig


@dataclass(frozen=True)
class TransferOptions:
    """How files are fetched."""

    workers: int = 8
    chunk: int = 32 * 1024**2
    """Most bytes, over all connections, that a kill or power cut makes it fetch twice."""
    flush_seconds: float = 5.0
    """Longest time that received bytes stay unrecorded on a slow line."""
    longest_run: int = 64 * 1024**2
    """Most bytes that are asked for in one request."""
    read: int = 256 * 1024
    """Most bytes that are read from a connection at once."""
    timeout: float = 20.0
    """Seconds of (near) silence that end a connection."""
    slowest: float = 1024.0
    """Bytes a second below which a connection counts as silent."""
    bytes_per_second: float | None = None
    """Limit over all connections."""
    first_delay: float = 1.0
    longest_delay: float = 60.0
    """Seconds before the first repetition, and at most."""
    use_xet: bool = False

    @classmethod
    def from_config(cls, config: DownloadConfig) -> "TransferOptions":
        """What the command line says about fetching."""
        return cls(
            workers=config.workers,
            timeout=config.timeout,
            bytes_per_second=config.bytes_per_second,
            use_xet=config.use_xet,
        )

    @property
    def piece(self) -> int:
        """Bytes that one connection gathers before it records them; the last read may go a little beyond."""
        return max(1, self.chunk // self.workers - self.read)
