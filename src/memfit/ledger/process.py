"""`memfit.process_peak`: the operating system's figure for a region, against which the ledger is held.

growth = (largest resident size in the region) - (resident size at its start). On Linux the kernel keeps the largest
resident size itself (VmHWM) and forgets it on request, so the figure is exact whatever allocates the memory. Elsewhere
it is the process's lifetime maximum where the region exceeds that, else the largest of many samples.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from memfit.errors import MemfitError

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # proc(5): "reset the peak resident set size to the process's current resident set size"
_SECONDS_BETWEEN_SAMPLES = 0.001

# Regions that are open, outermost first: a reset for an inner one must not lose the peak of those around it.
_open: list[ProcessPeak] = []


class ProcessPeak(AbstractContextManager["ProcessPeak"]):
    """The growth of the process's peak resident memory in a region; see :func:`process_peak`.

    Attributes:
        start: resident bytes at the region's start.
        method: how :attr:`peak` was found: ``"VmHWM"`` (the kernel's own figure, exact), ``"lifetime"`` (the region
            went above all that the process had used before, exact) or ``"sampled"`` (the largest of many samples, at
            most a little too small).
    """

    def __init__(self) -> None:
        self.start = 0
        self.method = ""
        self._peak = 0
        self._lifetime = 0
        self._sampler: threading.Thread | None = None
        self._stop = threading.Event()
        self._entered = self._closed = False

    def __enter__(self) -> ProcessPeak:
        if self._entered:
            raise MemfitError("This process_peak has been used already; make a new one with memfit.process_peak().")
        self._entered = True
        gc.collect()
        _give_back_free_heap()
        exact = _forget_peak()
        self.start = self._peak = resident()
        self._lifetime = _lifetime_peak()
        self.method = "VmHWM" if exact else "sampled"
        if not exact:
            self._sampler = threading.Thread(target=self._sample, name="memfit-process-peak", daemon=True)
            self._sampler.start()
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._update()
        self._closed = True
        _open.remove(self)
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._sampler = None

    @property
    def peak(self) -> int:
        """Largest resident size of the process in the region, in bytes; while it is open, up to now."""
        if self._entered and not self._closed:
            self._update()
        return self._peak

    @property
    def growth(self) -> int:
        """:attr:`peak` minus :attr:`start`, in bytes."""
        return self.peak - self.start

    def _update(self) -> None:
        if self.method == "VmHWM":
            self._peak = max(self._peak, _status("VmHWM"))
            return
        self._peak = max(self._peak, resident())
        lifetime = _lifetime_peak()
        if lifetime > self._lifetime:
            self._peak, self.method = max(self._peak, lifetime), "lifetime"

    def _sample(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            self._peak = max(self._peak, resident())


def process_peak() -> ProcessPeak:
    """Measure by how much the process's peak resident memory grows in a region.

    Before the region starts, garbage is collected and the C library's free heap is given back to the system
    (``malloc_trim``, glibc only). Otherwise memory that was freed earlier but is still resident would be used again
    unseen, and the growth would come out too small; the price is that the region's first allocations fault their pages
    in again. Memory that other owners keep in reserve (a CUDA context, an interpreter's arenas) is not affected.

    The figure is the whole process's: libraries that load in the region count as well (the first
    ``torch.optim`` optimizer of a process imports 70 MB of modules), and memory that is allocated but never written
    to does not. For a fair comparison run each candidate in a fresh process, after ``import torch``, a first
    optimizer and a tiny training step. Regions may be nested.

    Returns:
        A context manager with ``growth``, ``peak`` and ``start`` in bytes, and ``method``.

    Raises:
        MemfitError: on entry, when the system has no way to read the process's resident size.

    Example:
        >>> with memfit.process_peak() as measured:
        ...     train()
        >>> measured.growth
    """
    return ProcessPeak()


def resident() -> int:
    """Resident bytes of this process now.

    Raises:
        MemfitError: the system has no way to read it.
    """
    if sys.platform == "linux":
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    if sys.platform == "darwin":
        return _resident_on_macos()
    raise MemfitError(f"memfit.process_peak cannot read the process's resident memory on {sys.platform}.")


def _resident_on_macos() -> int:
    # libproc.h: proc_pidinfo(pid, PROC_PIDTASKINFO = 4, ...) fills a struct proc_taskinfo of 96 bytes, whose second
    # field is pti_resident_size, an unsigned 64-bit number of bytes.
    buffer = ctypes.create_string_buffer(96)
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    written = libproc.proc_pidinfo(os.getpid(), 4, ctypes.c_uint64(0), buffer, ctypes.c_int(96))
    if written != 96:
        raise MemfitError("memfit.process_peak cannot read the process's resident memory: proc_pidinfo failed.")
    return int(struct.unpack_from("=QQ", buffer)[1])


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise MemfitError(f"memfit.process_peak finds no {field} in {_STATUS}.")


def _lifetime_peak() -> int:
    import resource  # not there on Windows, where importing memfit must work all the same

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def _forget_peak() -> bool:
    """Have the kernel count the peak anew from here; False where that is not possible."""
    if sys.platform != "linux":
        return False
    for region in _open:
        region._update()
    try:
        _CLEAR_REFS.write_text(_FORGET_PEAK)
        # Some sandboxes accept the write and do nothing, or have no high-water mark at all.
        return abs(_status("VmHWM") - _status("VmRSS")) < 1 << 20
    except (OSError, MemfitError):
        return False


def _give_back_free_heap() -> None:
    if sys.platform == "win32":  # CDLL(None), the process itself, exists on POSIX only
        return
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library than glibc
        return
    malloc_trim.argtypes = [ctypes.c_size_t]
    malloc_trim(0)
