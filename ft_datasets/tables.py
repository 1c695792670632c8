"""Tables (.csv, .parquet, .arrow) -> rows, by the datasets library, which is imported only where there is one."""

import csv
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _

ROWS_AT_ONCE = 1000


def read_table(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a table; every cell of a CSV file is text, and what a table has no value for is None.

    Args:
        kind: csv, parquet or arrow.

    Raises:
        UserError: the file is damaged, or is not UTF-8.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet_datasets():
        from datasets import load_dataset

        # The library takes a path for a pattern, and would read nothing, or others, where it has a bracket or a star.
        link = Path(folder) / f"table.{kind}"
        link.symlink_to(path.resolve())
        try:
            settings = _as_text(path) if kind == "csv" else {"batch_size": ROWS_AT_ONCE} if kind == "parquet" else {}
            table = load_dataset(
                kind, data_files=str(link), split="train", streaming=True, cache_dir=folder, **settings
            )
            for part in table.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
                for row in part.to_pylist():  # not decoded: a column of pictures would need a library for them
                    yield {name: None if value != value else value for name, value in row.items()}  # NaN is no value
        except UnicodeDecodeError as error:
            raise not_utf8(path, _first_line_not_utf8(path)) from error
        except (ValueError, OSError, NotImplementedError, RuntimeError, csv.Error, Warning) as error:
            reason = " ".join(str(error).replace(str(link), str(path)).split())
            if isinstance(error, Warning):
                reason = _("its first row has more cells than its header. A cell with a comma in it needs quotes.")
            raise UserError(
                _("{file} can't be read as {kind}: {error}", file=path, kind=kind.upper(), error=reason)
            ) from error


def not_utf8(path: Path, line: int) -> UserError:
    """What to tell of a file that is not UTF-8 text from some line on."""
    return UserError(
        _(
            "{file}, line {line}: not UTF-8 text. Save the file as UTF-8 (for a GBK file: "
            "iconv -f GB18030 -t UTF-8 old.json > new.json).",
            file=path,
            line=line,
        )
    )


def _as_text(path: Path) -> dict[str, Any]:
    """Settings with which every column of a CSV file is text, as it stands: 007, NA and an empty cell too."""
    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(filter(None, csv.reader(file)), [])
    if len(set(header)) < len(header):
        raise ValueError(_("two of its columns have the same name."))
    # A column without a name is the row number that pandas writes.
    features = Features({name: Value("string") for name in header if name})
    # index_col: else a first row with a cell too many would shift all cells by one.
    return {"features": features, "na_filter": False, "index_col": False}


def _first_line_not_utf8(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Let the datasets library log nothing (reading so, it shows no bars), and a row that is too long be an error."""
    from datasets.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header")
            yield
    finally:
        set_verbosity(before)
