"""One real vLLM engine in a process of its own, told what to do by messages: `serve` is what that process runs.

A message is a list of requests, {"tokens", "count", "runahead", "abort", "lead"}; they run together, and the answer is
one message. `abort`: steps of the engine after which the client is gone. `lead`: steps before the request is asked.
"""

from __future__ import annotations

import os
import sys
import time

# What an engine needs in its environment before it imports anything.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def ask(llm, name, request):
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"runahead": request["runahead"]}} if request.get("runahead") else None
    sampling = SamplingParams(
        temperature=0, max_tokens=request["count"], ignore_eos=True, detokenize=False, logprobs=20, extra_args=extra
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": request["tokens"]}, sampling)


def answers(llm, connector, requests, first):
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    began, outputs, ttft, steps = time.monotonic(), {}, {}, 0
    names = {f"r{first + i}": request for i, request in enumerate(requests)}
    unasked, hasty = dict(names), {name for name, request in names.items() if "abort" in request}
    while unasked or engine.has_unfinished_requests():
        for name in [name for name, request in unasked.items() if request.get("lead", 0) <= steps]:
            ask(llm, name, unasked.pop(name))
        for name in [name for name in hasty if names[name]["abort"] <= steps]:
            hasty.remove(name)
            engine.abort_request([name])
        for output in engine.step():
            if output.outputs[0].token_ids:
                ttft.setdefault(output.request_id, time.monotonic() - began)
                outputs[output.request_id] = output.outputs[0]
        steps += 1
    while scheduler.has_requests():  # what is over is told to the workers, as the server's loop does
        engine.step()
    stats = scheduler.make_stats()
    told = {"answers": [], "steps": steps, "preempted": preemptions(scheduler), "usage": stats and stats.kv_cache_usage}
    for name in names:
        if name in outputs:
            logits = {token: entry.logprob for token, entry in outputs[name].logprobs[0].items()}
            told["answers"].append({"tokens": list(outputs[name].token_ids), "logits": logits, "ttft": ttft[name]})
        else:
            told["answers"].append(None)
    stages = getattr(scheduler.connector, "_stages", None)
    told["failures"] = stages and stages.given_up + stages.failed
    return told | (counts(connector._relay, scheduler) if connector is not None else {})


def preemptions(scheduler):
    return scheduler.preempted_in_all


def counts(relay, scheduler):
    stages, mailbox = scheduler.connector._stages, relay.receiver.mailbox
    counted = {**relay.counted, "recomputes": stages.failed, "waited": relay.waited}
    return {
        "counted": {**counted, "refused": dict(relay.receiver.refused), "shares": list(relay.shares)},
        "given_up": stages.given_up,
        # What is left of requests that are over.
        "left": {
            "blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1 - free_blocks(scheduler),
            "mailbox": mailbox.bytes,
            "queued": sum(sender._pending for sender in relay._senders.values()),
            "requests": len(stages._requests) + len(stages._owners) + len(stages._apart) + len(stages._finished),
            "chains": len(relay._lost) + len(relay._muted) + len(mailbox._held) + len(mailbox._came),
        },
    }


def free_blocks(scheduler):
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def count_preemptions(scheduler):
    """The scheduler's own count is of one step."""
    preempt = scheduler._preempt_request
    scheduler.preempted_in_all = 0

    def counting(*arguments, **keywords):
        scheduler.preempted_in_all += 1
        return preempt(*arguments, **keywords)

    scheduler._preempt_request = counting


def serve(options, channel, log, environment):
    os.environ |= {**ENVIRONMENT, **environment}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.path[:0] = options.pop("path", [])
    import vllm
    from vllm import LLM
    from vllm.config import KVTransferConfig

    chained = options.pop("connector", None)
    if chained is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="RunaheadConnector", kv_role="kv_both", **{"kv_load_failure_policy": "recompute", **chained}
        )
    llm = LLM(skip_tokenizer_init=True, **{"max_num_seqs": 16, **options})
    count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler)
    connector = None
    if chained is not None and options.get("tensor_parallel_size", 1) == 1:  # else workers have it
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
    relay = connector._relay if connector is not None else None
    where = {"address": relay and relay.address, "model": relay and relay._peer.model}
    channel.send({**where, "release": vllm.__version__})
    count = 0
    while True:
        try:
            requests = channel.recv()
        except EOFError:
            return
        channel.send(answers(llm, connector, requests, count))
        count += len(requests)
