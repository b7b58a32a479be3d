"""DPM-Solver and DPM-Solver++: fast solvers of the probability-flow equation."""

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler

__all__ = ["DPMSolverSampler"]
