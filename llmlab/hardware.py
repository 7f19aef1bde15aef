"""Accelerators as data, and the two families of byte units.

Figures are the makers' data sheets: dense rates, no sparsity. What a card really reaches is measured in
``benchmarks/results``; these are the ceilings that predictions start from.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.arguments import number, one_of

GB = 10**9
GiB = 2**30
_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": GB,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": GiB,
    "TiB": 2**40,
}


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator.

    memory_bytes: what is soldered on (a card sold as "80 GB" holds 80 GiB); memory_bandwidth: bytes/s;
    flops: operations/s of a dense matrix product by dtype; link_bandwidth: bytes/s to a neighbour in one direction.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    flops: tuple[tuple[str, float], ...]
    link_bandwidth: float

    def __post_init__(self) -> None:
        number(above=0)(f"memory_bytes of {self.name!r}", self.memory_bytes)

    def flops_of(self, dtype: str) -> float:
        """Operations per second in ``dtype``; ValueError where the card has no such unit."""
        rates = dict(self.flops)
        one_of(rates)("dtype", dtype)
        return rates[dtype]


def _device(name: str, gib: float, tb_s: float, link_gb_s: float, **tflops: float) -> DeviceSpec:
    rates = tuple((dtype, rate * 1e12) for dtype, rate in tflops.items())
    return DeviceSpec(name, int(gib * GiB), tb_s * 1e12, rates, link_gb_s * 1e9)


DEVICES: dict[str, DeviceSpec] = {
    device.name: device
    for device in (
        _device("t4-16gb", 16, 0.320, 16, float32=8.1, float16=65, int8=130),
        _device("v100-16gb", 16, 0.900, 150, float32=15.7, float16=125),
        _device("v100-32gb", 32, 0.900, 150, float32=15.7, float16=125),
        _device("a10-24gb", 24, 0.600, 32, float32=31.2, float16=125, bfloat16=125, int8=250),
        _device("l4-24gb", 24, 0.300, 32, float32=30.3, float16=121, bfloat16=121, float8=242, int8=242),
        _device("rtx-4090-24gb", 24, 1.008, 32, float32=82.6, float16=165, bfloat16=165, float8=330, int8=661),
        _device("a100-40gb", 40, 1.555, 300, float32=19.5, float16=312, bfloat16=312, int8=624),
        _device("a100-80gb", 80, 2.039, 300, float32=19.5, float16=312, bfloat16=312, int8=624),
        _device("h100-80gb", 80, 3.35, 450, float32=67, float16=989, bfloat16=989, float8=1979, int8=1979),
        _device("h200-141gb", 141, 4.8, 450, float32=67, float16=989, bfloat16=989, float8=1979, int8=1979),
    )
}


def find_device(device: DeviceSpec | str) -> DeviceSpec:
    """The device itself, or the preset of that name; ValueError with the nearest names for any other."""
    if isinstance(device, DeviceSpec):
        return device
    one_of(DEVICES)("device", device)
    return DEVICES[device]


def format_bytes(num_bytes: float, unit: str = "GB", digits: int = 2) -> str:
    """``num_bytes`` in ``unit``, with the unit's name: GB is 10^9 bytes, GiB is 2^30."""
    one_of(_UNITS)("unit", unit)
    number()("num_bytes", num_bytes)
    return f"{num_bytes / _UNITS[unit]:,.{digits}f} {unit}"
