"""C++ operators: compiled on first use, for those who ask for them with ``native=True``. None is ever needed.

Each computes in one call what the module beside it computes in some twenty of torch's or NumPy's, which is what the
time of small tensors goes into.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from memfit.errors import ConversionError, require

FILTERED = Path(__file__).parent / "activations" / "filtered.cpp"
KRONECKER_SUM = Path(__file__).parent / "gradients" / "kronecker_sum.cpp"


@cache
def operator(source: Path) -> ModuleType:
    """A compiled operator, from torch's folder of extensions when it was compiled before.

    Args:
        source: one of those above.

    Raises:
        ConversionError: there is no C++ compiler, or it fails.
        MissingExtraError: there is no ninja, which runs it.
    """
    from torch.utils import cpp_extension  # takes its time, and is for those who need it

    if shutil.which("ninja") is None:  # as in an environment that is not activated
        os.environ["PATH"] += os.pathsep + require("ninja", extra="native").BIN_DIR
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise ConversionError(
            f"native=True compiles a C++ operator, and there is no compiler {compiler!r}: install one, or leave native "
            "out."
        )
    name = f"memfit_{source.stem}"
    lock = Path(cpp_extension._get_build_directory(name, verbose=False), "lock")
    if lock.exists():
        warnings.warn(
            f"waiting for the process that compiles a C++ operator; if there is none any more, delete {lock}.",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        with redirect_stdout(sys.stdout or io.StringIO()):  # which torch wants to be there
            return cpp_extension.load(
                name=name,
                sources=[str(source)],
                extra_cflags=["-O3", "-march=native", "-fopenmp"],
                extra_ldflags=["-fopenmp"],
            )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(f"the C++ operator can't be compiled ({reason}): leave native out.") from error


def suits(*tensors: Tensor | None) -> bool:
    """Whether an operator takes these tensors: plain ones on the CPU, float32 or float64, the same for all."""
    given = [tensor for tensor in tensors if tensor is not None]
    kind = given[0].dtype
    return (
        kind in (torch.float32, torch.float64)
        and all(tensor.dtype == kind and tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter) for tensor in given)
        and not any(tensor.is_neg() for tensor in given)
        and not torch.compiler.is_compiling()
    )
