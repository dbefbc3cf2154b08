"""GPUs that the kernels are compiled for: what a program may use, and how many fit on one processor."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """Limits of one architecture.

    Attributes:
        name: as compilers call it. gpu: what Triton compiles for.
        thread_registers: most 32-bit registers of a thread. registers: a processor's (an SM's, a CU's), divided by the
            lanes of a warp. register_unit: allocation step.
        shared: most bytes of shared memory (LDS) of a program. processor_shared: of a processor. reserved: bytes of it
            that the system takes for every program.
        warps, programs: most that are resident on a processor.
        tensor_columns: columns of tensor memory of a processor.
        schedulers: parts of a processor, each with its own registers, that warps are dealt to.
    """

    name: str
    gpu: GPUTarget
    thread_registers: int
    registers: int
    register_unit: int
    shared: int
    processor_shared: int
    reserved: int
    warps: int
    programs: int
    tensor_columns: int
    schedulers: int = 4

    @property
    def amd(self) -> bool:
        return self.gpu.backend == "hip"

    def occupancy(self, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
        """Share of a processor's warps that can be resident, for programs of ``warps`` warps with these needs."""
        per_warp = max(-(-registers // self.register_unit) * self.register_unit, self.register_unit)
        warps_by_registers = self.registers // self.schedulers // per_warp * self.schedulers
        fits = [self.programs, self.warps // warps, warps_by_registers // warps]
        if shared:
            fits.append(self.processor_shared // (shared + self.reserved))
        if tensor_columns:
            fits.append(self.tensor_columns // tensor_columns)
        return min(fits) * warps / self.warps


def _nvidia(
    capability: int, shared_kib: int, *, tensor_columns: int = 0, warps: int = 64, programs: int = 32
) -> Target:
    return Target(
        name=f"sm_{capability}",
        gpu=GPUTarget("cuda", capability, 32),
        thread_registers=255,
        registers=65536 // 32,
        register_unit=8,
        shared=(shared_kib - 1) * 1024,
        processor_shared=shared_kib * 1024,
        reserved=1024,
        warps=warps,
        programs=programs,
        tensor_columns=tensor_columns,
    )


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 164),
        _nvidia(86, 100, warps=48, programs=16),  # gaming cards; 8.9 and 12.0 have as little shared memory
        _nvidia(90, 228),
        _nvidia(100, 228, tensor_columns=512),
        Target(
            name="gfx942",
            gpu=GPUTarget("hip", "gfx942", 64),
            thread_registers=512,
            registers=2048,
            register_unit=8,
            shared=65536,
            processor_shared=65536,
            reserved=0,
            warps=32,
            programs=32,
            tensor_columns=0,
        ),
    )
}
