"""Peak rates of three accelerators, from their makers' data sheets: dense (no structured sparsity), boost clock.

=========  ==========  ======  =======  ==========  =======================================================
device     bf16, fp16  tf32    fp32     bandwidth   source
=========  ==========  ======  =======  ==========  =======================================================
H100 SXM   989.4       494.7   66.9     3.35 TB/s   "NVIDIA H100 Tensor Core GPU" data sheet (it prints the
                                                    rates with sparsity, twice these) and the "NVIDIA H100
                                                    Tensor Core GPU Architecture" white paper; 80 GB HBM3
A100 SXM   312         156     19.5     2.039 TB/s  "NVIDIA A100 Tensor Core GPU" data sheet; 80 GB HBM2e
MI300X     1307.4      653.7   163.4    5.3 TB/s    "AMD Instinct MI300X Accelerator" data sheet; HBM3
=========  ==========  ======  =======  ==========  =======================================================

TFLOP/s. The 16-bit and tf32 rates are those of the matrix units with fp32 accumulation. fp32 on the two NVIDIA parts
is the rate of the vector units: their matrix units have no fp32 mode. A kernel reaches 60 to 90 % of these numbers; a
floor computed with them is a floor.
"""

from __future__ import annotations

from dataclasses import dataclass

_TERA = 1e12


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of one device. rates: FLOP/s by dtype; bandwidth: bytes/s of its main memory."""

    name: str
    rates: dict[str, float]
    bandwidth: float


def _accelerator(name: str, half: float, tf32: float, fp32: float, bandwidth: float) -> Accelerator:
    rates = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}
    return Accelerator(name, {dtype: rate * _TERA for dtype, rate in rates.items()}, bandwidth * _TERA)


ACCELERATORS = {
    "h100": _accelerator("H100 SXM", 989.4, 494.7, 66.9, 3.35),
    "a100": _accelerator("A100 SXM", 312.0, 156.0, 19.5, 2.039),
    "mi300x": _accelerator("MI300X", 1307.4, 653.7, 163.4, 5.3),
}
