"""What an engine imports, imported once for all engines of a test run: they are forked from here."""

import vllm
from vllm.distributed import kv_transfer
from vllm.model_executor.models import llama, qwen3
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.worker import cpu_model_runner, cpu_worker

MODULES = (vllm, vllm.LLM, kv_transfer, llama, qwen3, cpu_attn, cpu_model_runner, cpu_worker)
