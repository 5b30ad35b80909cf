"""Whose memory a thread has, as code for processes that tests start."""

HAS_ONE_HEAP = """
import ctypes, threading

def has_one_heap():
    "Whether a second thread gets memory from what the kernel names the heap, which is the first thread's."
    library, places = ctypes.CDLL(None), []
    library.malloc.restype = ctypes.c_size_t
    thread = threading.Thread(target=lambda: places.append(library.malloc(1 << 16)))  # too little to be mapped alone
    thread.start()
    thread.join()
    for line in open("/proc/self/maps"):
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= places[0] < last:
            return line.endswith("[heap]\\n")
"""
