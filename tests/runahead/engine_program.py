"""One real vLLM engine in a process of its own, told what to do by lines of JSON: `python engine_program.py OPTIONS`.

A line is a list of requests, {"tokens", "count", "runahead"}; they run together, and the answer is a line too.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def ask(llm, number, request):
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"runahead": request["runahead"]}} if request.get("runahead") else None
    sampling = SamplingParams(
        temperature=0, max_tokens=request["count"], ignore_eos=True, detokenize=False, logprobs=20, extra_args=extra
    )
    llm.llm_engine.add_request(f"r{number}", {"prompt_token_ids": request["tokens"]}, sampling)


def answers(llm, connector, requests, first):
    began, outputs, ttft = time.monotonic(), {}, {}
    for i, request in enumerate(requests):
        ask(llm, first + i, request)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.outputs[0].token_ids:
                ttft.setdefault(output.request_id, time.monotonic() - began)
                outputs[output.request_id] = output.outputs[0]
    relay = connector._relay if connector is not None else None
    counted = {**relay.counted, "waited": relay.waited, "refused": dict(relay.receiver.refused)} if relay else {}
    return {
        "answers": [
            {
                "tokens": list(outputs[f"r{first + i}"].token_ids),
                "logits": {token: entry.logprob for token, entry in outputs[f"r{first + i}"].logprobs[0].items()},
                "ttft": ttft[f"r{first + i}"],
            }
            for i in range(len(requests))
        ],
        "counted": counted,
        "given_up": llm.llm_engine.engine_core.engine_core.scheduler.connector._stages.given_up if relay else 0,
    }


def main():
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    options = json.loads(sys.argv[1])
    from vllm import LLM
    from vllm.config import KVTransferConfig

    chained = options.pop("connector", None)
    if chained is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="RunaheadConnector",
            kv_connector_module_path="forerun.runahead.vllm",
            kv_role="kv_both",
            **{"kv_load_failure_policy": "recompute", **chained},
        )
    llm = LLM(skip_tokenizer_init=True, max_num_seqs=16, **options)
    connector = None
    if chained is not None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
    relay = connector._relay if connector is not None else None
    where = {"address": relay and list(relay.address), "model": relay and relay._peer.model.hex()}
    print(json.dumps(where), file=told, flush=True)
    count = 0
    for line in sys.stdin:
        requests = json.loads(line)
        print(json.dumps(answers(llm, connector, requests, count)), file=told, flush=True)
        count += len(requests)


if __name__ == "__main__":
    main()
