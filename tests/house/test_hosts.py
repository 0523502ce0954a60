"""The hosts start in the environments that `make setup` makes."""

SGLANG = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}


def python_of(environment):
    assert environment.is_dir(), f"there is no {environment.name} here: make setup"
    return environment / "bin" / "python"


def test_four_hosts_share_one_environment(root, run_python):
    hosts = "import torch, diffusers, vllm, deepspeed, torchrec; from vllm import LLM; print(LLM.__name__)"
    assert run_python(hosts, python_of(root / ".venv")).split()[-1] == "LLM"


def test_sglang_starts_with_the_shims(root, run_python):
    shims = str(root / "tests" / "hosts" / "sglang_shims")
    code = "import sglang.srt.entrypoints.engine as engine; print(engine.Engine.__name__)"
    assert run_python(code, python_of(root / ".venv-sglang"), PYTHONPATH=shims, **SGLANG).split()[-1] == "Engine"


def test_the_oldest_diffusers_carries_the_drop_in(root, run_python):
    code = "import forerun.picard.diffusers, diffusers; print(diffusers.__version__)"
    assert run_python(code, python_of(root / ".venv-oldest")).split()[-1] == "0.33.1"
