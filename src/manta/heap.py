"""What the C library's heap holds while tensors come and go: more than is alive, since what is freed leaves holes.

Asked of the heap itself: each piece is allocated as torch does on a CPU and never written to, so that it takes
addresses and no memory, and glibc says how large its heap is (mallinfo(3)). Where there is no glibc, nothing is known.

A process that trains has one heap for all its threads. Ray trains in a thread that is not the first; glibc gives such a
thread an arena of its own, which grows by pieces of 64 MiB (malloc/arena.c). Few activations fit into one, and steps of
different sizes leave more and more holes. Before 2.39 glibc also cuts the aligned pieces that torch asks for out of
larger ones, and puts what is left over, some tens of bytes, into its tcache and fastbins, where it does not merge with
its neighbour again (https://sourceware.org/bugzilla/show_bug.cgi?id=30723): a tensor does not fit into the hole that
one of its size leaves. Without the two it does. benchmarks/training.py measures it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys

ARENAS, TUNABLES = "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"
_UNCACHED = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_M_ARENA_MAX = -8  # malloc.h
_ALIGNMENT = 64  # c10/core/alignment.h
# glibc takes what was once freed up to this size from the heap from then on (M_MMAP_THRESHOLD, mallopt(3)).
_LARGEST = 31 * 2**20
_SMALLEST_HOLE = 1 << 10  # what is smaller makes no difference


def variables() -> dict[str, str]:
    """What glibc reads when a process that trains begins, unless this process was told something else."""
    return {ARENAS: os.environ.get(ARENAS, "1"), TUNABLES: os.environ.get(TUNABLES, _UNCACHED)}


def begin_again() -> None:
    """Have Python begin anew in this process, without tcache and fastbins; returns where it has, or need not.

    For one whose forks train, at its very beginning: its command line is read again, and nothing else is kept.
    """
    if os.environ.get(TUNABLES) == _UNCACHED:
        del os.environ[TUNABLES]  # what else this process starts, such as Ray's own, is to be as it is
    elif TUNABLES not in os.environ and keeps_remainders():
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: _UNCACHED})


def keeps_remainders() -> bool:
    """Whether this C library is one of those that need it."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):  # another C library
        return False
    return name == "glibc" and tuple(map(int, version.split("."))) < (2, 39)


def unite() -> None:
    """One heap for all threads of this process, before it has a second; `ARENAS` was read when it began."""
    if ARENAS not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class _Info(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Heap:
    """Pieces of this process's heap, whose holes are filled first, as if the process were new.

    `most` is the most bytes that it grew by; 0 where that is not known.
    """

    def __init__(self) -> None:
        self.most = self._before = 0
        self._pieces: set[int] = set()
        self._c: ctypes.CDLL | None = None
        gc.collect()  # or what is freed meanwhile, in cycles, counts as if it were given back here
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallinfo2.restype = _Info
            library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
            library.free.argtypes = [ctypes.c_void_p]
            self._c = library
            self.give(self.take(_LARGEST))
            self._fill()
        self._before, self.most = self._size(), 0

    def take(self, size: int) -> int | None:
        """A piece of `size` bytes; None where there are none to be had."""
        place = ctypes.c_void_p()
        if self._c is None or self._c.posix_memalign(ctypes.byref(place), _ALIGNMENT, max(1, size)) or not place.value:
            return None
        self._pieces.add(place.value)
        if size >= _SMALLEST_HOLE:
            self.most = max(self.most, self._size() - self._before)
        return place.value

    def give(self, piece: int | None) -> None:
        """Free it."""
        if piece in self._pieces and self._c is not None:
            self._pieces.discard(piece)
            self._c.free(piece)

    def close(self) -> None:
        """Free all that is left."""
        for piece in list(self._pieces):
            self.give(piece)

    def _fill(self) -> None:
        size = _LARGEST
        while size >= _SMALLEST_HOLE:
            before = self._size()
            piece = self.take(size)
            if piece is None or self._size() > before:
                self.give(piece)
                size //= 2

    def _size(self) -> int:
        if self._c is None:
            return 0
        info = self._c.mallinfo2()
        return info.arena + info.hblkhd
