"""CSV and Parquet files, read to a DataFrame or refused with the line that is wrong.

pandas fills short rows, renames repeated columns and takes a first column for an index without a word. So
the structure of a CSV file is checked first, row by row, with the csv module; pandas then infers the types.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paperback.data import sniff
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_TEXT_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = _TEXT_SUFFIXES + _PARQUET_SUFFIXES

_SEPARATORS = ",;\t|"
_SAMPLE_LINES = 50
_COMMA_DECIMAL = re.compile(r"[+-]?\d*,\d+")
_POINT_DECIMAL = re.compile(r"[+-]?\d*\.\d+")


def read_frame(path: Path) -> pd.DataFrame:
    """Read a table with named columns.

    CSV files are UTF-8, perhaps gzip-compressed, with a header line. The separator (comma, semicolon, tab
    or bar) is found from the first lines; in files with another separator than the comma, numbers may have
    a decimal comma. Cells that say NA, N/A, NaN, null or None count as empty. A first column without a name
    that counts the rows (what pandas writes as the index) is left out.

    Args:
        path: ``.csv``, ``.tsv`` (also ``.gz``), ``.parquet`` or ``.pq``.

    Returns:
        Columns of numbers, booleans, strings or categories, with NaN or None where a cell is empty; rows
        counted from 0.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    sniff.check_file(path)
    name = path.name.lower()
    if name.endswith(_TEXT_SUFFIXES):
        frame = _read_text(path)
    elif name.endswith(_PARQUET_SUFFIXES):
        frame = _read_parquet(path)
    else:
        raise DataError(f"{path} has no suffix of a table; use one of {', '.join(SUFFIXES)}.")
    if len(frame) == 0:
        raise DataError(f"{path} has a header but no rows; export it again.")
    infinite = frame.select_dtypes("number").isin([np.inf, -np.inf])
    if infinite.any(axis=None):
        row, column = np.argwhere(infinite.to_numpy())[0]
        raise DataError(
            f"{path}, column {infinite.columns[column]}, row {row} (counted from 0) is infinite; replace it "
            "or leave the cell empty."
        )
    return frame


def is_numeric(values: pd.Series[Any]) -> bool:
    """Whether a column holds numbers; booleans are none."""
    from pandas.api import types

    return types.is_numeric_dtype(values) and not types.is_bool_dtype(values)


# -- CSV ---------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> pd.DataFrame:
    import pandas as pd

    text = _decode(path, _content(path))
    separator = _separator(text)
    header = _check_rows(path, text, separator)
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            decimal=_decimal(text, separator),
            index_col=False,
            skipinitialspace=True,
            low_memory=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} cannot be parsed ({str(error).splitlines()[0][:100]}); mend it or export it again."
        ) from error
    frame.columns = pd.Index(header)
    if header[0] == "":
        steps = pd.to_numeric(frame.iloc[:, 0], errors="coerce").diff().iloc[1:]
        if len(header) == 1 or not (steps == 1).all():
            raise DataError(f"{path}, line 1: column 1 has no name; give it one.")
        frame = frame.iloc[:, 1:]
    return frame


def _content(path: Path) -> bytes:
    """The bytes of a text file, decompressed within the limit."""
    compressed = path.name.lower().endswith(".gz")
    sniff.check_kind(path, "gzip-compressed data" if compressed else "text")
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            data = file.read(sniff.MAX_BYTES + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is cut short or damaged; copy or compress it again.") from error
    if len(data) > sniff.MAX_BYTES:
        raise DataError(
            f"{path} holds more than the {sniff.MAX_BYTES / 2**30:.0f} GiB that are read at once; take a "
            "sample of its rows."
        )
    if not data.strip():
        raise DataError(f"{path} holds nothing but blanks; export it again.")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8, for "
            "example with iconv -f latin1 -t utf-8."
        ) from error
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise DataError(f"{path}, line {line} has a NUL byte, so it is no text; export it again.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _separator(text: str) -> str:
    """The candidate that cuts the most of the first lines as it cuts the header, into more than one field."""
    lines = list(itertools.islice(io.StringIO(text), _SAMPLE_LINES))

    def score(candidate: str) -> tuple[int, int]:
        try:
            counts = [len(row) for row in csv.reader(lines, delimiter=candidate) if row]
        except csv.Error:  # a field beyond the limit of the csv module: no sign of a separator
            return 0, 0
        return (sum(count == counts[0] for count in counts) if counts[0] > 1 else 0, counts[0])

    return max(_SEPARATORS, key=score)


def _check_rows(path: Path, text: str, separator: str) -> list[str]:
    """Check the header and the number of fields of every row; return the header."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    header: list[str] | None = None
    line = 1  # where the current row begins: a quoted text may go over several lines
    try:
        for row in reader:
            if header is None:
                if row:
                    header = [name.strip() for name in row]
                    _check_header(path, header)
            elif row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {line} has {len(row)} fields where the header has {len(header)}; mend the "
                    "line (a text that contains the separator needs quotes)."
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}; check the quotes from there on.") from error
    assert header is not None  # blank files were refused
    return header


def _check_header(path: Path, header: list[str]) -> None:
    check_names(f"{path}, line 1", header)
    unnamed = [place for place, name in enumerate(header, start=1) if name == ""]
    if unnamed and unnamed != [1]:
        raise DataError(f"{path}, line 1: column {unnamed[-1]} has no name; give every column one.")
    if all(_is_number(name) for name in header):
        raise DataError(
            f"{path}, line 1 is all numbers ({', '.join(header[:3])} ...); put a line with the names of the "
            "columns before it."
        )


def check_names(place: str, names: list[str]) -> None:
    """Refuse repeated column names.

    Raises:
        DataError: naming the one that is repeated most.
    """
    if names:
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise DataError(f"{place}: column {name!r} appears {times} times; rename or remove all but one.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _decimal(text: str, separator: str) -> str:
    """A comma if the first lines have numbers like 3,14 and none like 3.14."""
    if separator == ",":
        return "."
    rows = list(csv.reader(itertools.islice(io.StringIO(text), _SAMPLE_LINES), delimiter=separator))[1:]
    cells = [cell.strip() for row in rows for cell in row]
    comma = any(_COMMA_DECIMAL.fullmatch(cell) for cell in cells)
    return "," if comma and not any(_POINT_DECIMAL.fullmatch(cell) for cell in cells) else "."


# -- Parquet -----------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sniff.check_kind(path, "a Parquet file")
    try:
        file = pq.ParquetFile(path)
        metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is cut short or damaged, its footer cannot be read; copy or export it again."
        ) from error
    check_names(str(path), schema.names)
    if not schema.names:
        raise DataError(f"{path} has no columns; export it again.")
    claimed = metadata.num_rows * len(schema.names) * 8
    if claimed > sniff.MAX_BYTES:
        raise DataError(
            f"{path} has {metadata.num_rows:,} rows, more than the {sniff.MAX_BYTES / 2**30:.0f} GiB that "
            "are read at once; take a sample of its rows."
        )
    _check_types(path, schema)
    try:
        table = file.read()
        decimals = [field.name for field in schema if pa.types.is_decimal(field.type)]
        for name in decimals:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.float64()))
        # pandas' notes on the types are not needed and may be wrong; a named index is a column like others.
        index = [name for name in schema.names if re.fullmatch(r"__index_level_\d+__", name)]
        frame: pd.DataFrame = table.drop_columns(index).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is cut short or damaged; copy or export it again.") from error
    return frame


def _check_types(path: Path, schema: object) -> None:
    import pyarrow as pa

    for field in schema:  # type: ignore[attr-defined]
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        plain = (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
            or pa.types.is_decimal(kind)
            or pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_string_view(kind)
            or pa.types.is_null(kind)
        )
        if not plain:
            raise DataError(
                f"{path}, column {field.name} has type {field.type}; numbers, booleans and text are "
                "understood, so convert or remove it."
            )
