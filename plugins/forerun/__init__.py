"""forerun: the same answer, sooner. Published parallelisation schemes as drop-ins for frameworks people already run.

The map, one line a room:

- `forerun.picard`: parallel-in-time diffusion sampling; `forerun.picard.diffusers.PicardScheduler` is its drop-in.
- `forerun.runahead`: splits a long prompt over several engines (KV-Runahead); `forerun runahead plan` explains how.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
