"""forerun: the same answer, sooner. Published parallelisation schemes as drop-ins for frameworks people already run.

The map, one line a room:

- `forerun.picard`: parallel-in-time diffusion sampling; `forerun.picard.diffusers.PicardScheduler` is its drop-in.
- `forerun.dlrm`: sharding plans with a proven gap; `forerun.dlrm.torchrec.DLRMPlanner` is its drop-in.
- `forerun.runahead`: a long prompt's first token from several vLLM engines; its connector is here, its front not yet.
- `forerun.moe`: expert placement for mixture-of-experts models; `forerun.moe.deepspeed.speculate` is its drop-in.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
