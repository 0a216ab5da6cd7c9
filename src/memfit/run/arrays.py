"""Arrays from an ``.npz`` file of the user's, which may be anything."""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy

from memfit.errors import DataError
from memfit.files import check_ordinary

# What numpy and zipfile raise for damaged files; RuntimeError is for encrypted members, and for compressions that
# Python does not know.
_DAMAGE = (
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    SyntaxError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


def read_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, numpy.ndarray]:
    """Read arrays by name.

    Args:
        path: a file as ``numpy.savez`` writes it.
        needed: names that must be there.
        optional: names that are read if they are there.

    Raises:
        DataError: it is another kind of file, or a damaged one; an array is missing or does not fit into memory.
        OSError: it can't be opened.
    """
    check_ordinary(path, "file of arrays", DataError)
    damaged = f"{path}: not an .npz file of plain arrays, or a damaged one; save it again."
    try:
        with path.open("rb") as stream:
            file = numpy.load(stream, allow_pickle=False)
            if not isinstance(file, numpy.lib.npyio.NpzFile):
                raise DataError(f"{path}: holds one array; save several, {', '.join(needed)}, with numpy.savez.")
            missing = [name for name in needed if name not in file.files]
            if missing:
                raise DataError(
                    f"{path}: has no array {' and no array '.join(missing)}; it has {', '.join(file.files)}."
                )
            arrays = {name: file[name] for name in (*needed, *optional) if name in file.files}
    except _DAMAGE as error:
        raise DataError(damaged) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(damaged) from error  # what bz2 says of damaged bytes
    except MemoryError as error:
        raise DataError(f"{path}: its arrays do not fit into memory.") from error
    if not all(isinstance(array, numpy.ndarray) for array in arrays.values()):
        raise DataError(damaged)
    return arrays
