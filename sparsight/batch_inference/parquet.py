"""pyarrow, an optional dependency."""

from types import ModuleType


def parquet() -> ModuleType:
    """The module ``pyarrow.parquet``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install 'sparsight[batch]'.") from error
    return pyarrow.parquet
