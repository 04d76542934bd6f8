"""Stands for torch on a GPU in a worker whose engine computes nothing: events, allocator counters and one 80 GiB device."""

import time
from types import SimpleNamespace

float32, bfloat16 = "float32", "bfloat16"
capped = []


class OutOfMemoryError(RuntimeError):
    pass


class Scalar(float):
    def detach(self):
        return self

    def to(self, dtype):
        return self

    def reshape(self, shape):
        return self


class Pinned:
    def __init__(self):
        self.cells = {}

    def __getitem__(self, key):
        if isinstance(key, tuple):
            return SimpleNamespace(copy_=lambda value, non_blocking: self.cells.__setitem__(key, float(value)))
        return SimpleNamespace(tolist=lambda: [self.cells.get((key, 0)), self.cells.get((key, 1))])


class Event:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def full(shape, value, dtype, pin_memory):
    return Pinned()


def as_tensor(value):
    return Scalar(value)


def randn(*size, device, dtype):
    return Scalar(1.0)


def empty_like(other):
    return other


def mm(a, b, out):
    time.sleep(0.001)


def stats():
    peaks = {f"{kind}_bytes.all.peak": size * 2**30 for kind, size in (("allocated", 2), ("active", 3), ("reserved", 4))}
    return {**peaks, "num_alloc_retries": 0}


cuda = SimpleNamespace(
    Event=Event,
    synchronize=lambda: None,
    empty_cache=lambda: None,
    memory_stats=stats,
    memory_stats_as_nested_dict=lambda: {"reserved_bytes": {"all": {"current": 4 * 2**30}}},
    reset_peak_memory_stats=lambda: None,
    device_count=lambda: 1,
    get_device_properties=lambda index: SimpleNamespace(uuid="0", total_memory=80 * 2**30),
    get_device_capability=lambda: (9, 0),
    set_per_process_memory_fraction=lambda fraction, index: capped.append(fraction),
)
