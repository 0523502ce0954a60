"""`forerun dlrm calibrate`: measures on the ranks that torchrun started, or on processes of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from forerun.dlrm.calibration import Calibration, Line
from forerun.dlrm.measure import Effort, measure
from forerun.report import hardware, versions

__all__ = ["CalibrationError", "Job", "calibrate", "found_device"]


class CalibrationError(Exception):
    """Nothing could be measured; the message says why and what to do."""


@dataclass(frozen=True)
class Job:
    """What is to be measured, and where it is written."""

    out: Path
    device: str  # cpu or cuda
    timeout: float = 600.0  # seconds of the whole; under torchrun of each exchange
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise CalibrationError(f"device {self.device!r}: expected cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CalibrationError("device cuda: torch finds no GPU here; --device cpu measures the CPU")
        if self.timeout <= 0:
            raise CalibrationError(f"timeout {self.timeout}: expected seconds, more than 0")
        if not self.out.absolute().parent.is_dir():
            raise CalibrationError(f"{self.out}: there is no folder {self.out.absolute().parent}")

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"


def found_device() -> str:
    """cuda where torch finds a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def calibrate(job: Job, ranks: int | None, progress: Callable[[str], None]) -> bool:
    """Measures, and writes the file; whether this process was the one to write it.

    Args:
        job: What and where.
        ranks: Processes to start on this machine; None under torchrun, which has started them.
        progress: Is told what is being measured, on the first rank.

    Raises:
        CalibrationError: A rank was lost, the time ran out, or the ranks do not fit the machine. No file is written.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if ranks is not None:
            raise CalibrationError("--ranks is for a start without torchrun, which has started the ranks already")
        return _under_torchrun(job, os.environ, progress)
    if ranks is None or ranks < 1:
        raise CalibrationError(f"ranks {ranks}: expected 1 or more (--ranks), or a start by torchrun")
    if job.device == "cuda" and ranks > torch.cuda.device_count():
        raise CalibrationError(f"{ranks} ranks and {torch.cuda.device_count()} GPUs: NCCL needs one for each rank")
    _on_processes(job, ranks)
    return True


def _under_torchrun(job: Job, environment: Mapping[str, str], progress: Callable[[str], None]) -> bool:
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank, local_size = (int(environment.get(name, size)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    _on_rank(job, rank, size, local_rank, local_size, "env://", progress)
    return rank == 0


def _on_processes(job: Job, ranks: int) -> None:
    """Starts the ranks on this machine; none is left when it returns."""
    deadline = time.monotonic() + job.timeout
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_process, (job, ranks, f"file://{folder}/store"), ranks, join=False, daemon=True)
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise CalibrationError(f"not done after {job.timeout:g} s; --timeout gives it longer")
        except ProcessExitedException as error:
            how = error.signal_name or f"exit status {error.exit_code}"
            raise CalibrationError(f"rank {error.error_index} ended by {how} before it had measured") from error
        except ProcessRaisedException as error:
            told = str(error).strip().splitlines()[-1]  # of a traceback
            raise CalibrationError(told.removeprefix(f"{__name__}.{CalibrationError.__name__}: ")) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _process(rank: int, job: Job, size: int, store: str) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    _on_rank(job, rank, size, rank, size, store, print)


def _on_rank(
    job: Job, rank: int, size: int, local_rank: int, local_size: int, store: str, progress: Callable[[str], None]
) -> None:
    device = torch.device(job.device, local_rank) if job.device == "cuda" else torch.device("cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            job.backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=job.timeout)
        )
        lines = measure(device, local_size, job.effort, progress if rank == 0 else _silent)
        if rank == 0:
            _calibration(job, device, size, local_size, lines).save(job.out)
    except (RuntimeError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise CalibrationError(f"rank {rank} of {size}: {told}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _calibration(job: Job, device: torch.device, size: int, local_size: int, lines: Sequence[Line]) -> Calibration:
    return Calibration(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        compute_device=device.type,
        backend=job.backend,
        world_size=size,
        local_world_size=local_size,
        threads=torch.get_num_threads(),
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else hardware(),
        versions=versions(),
        lines=tuple(lines),
    )


def _silent(text: str) -> None:
    """What a rank that is not the first says of its progress."""
