"""KV-Runahead: a long prompt's first token from several engines, each with the whole model, at once.

The prompt is split into contexts, later ones shorter. All engines start together; layer by layer each gets the keys and
values of all tokens before its own from the engine before it, sends them on with its own, and attends. The last engine
gives the first token and holds the whole cache, so it decodes on.

    cost.py       what a context takes, fitted to measured times
    shape.py      a model's sizes: bytes of keys and values, arithmetic
    chain.py      when every engine of a chain does what (the recurrence)
    partition.py  the split whose first token comes soonest, one engine included
    table.py      splits kept per model, hardware and number of engines; prompts between rows
    refining.py   a table corrected by what contexts take while it serves
    engine_client.py, calibrate.py, tuning.py   engines measured over their API, and the table that follows
    rehearsal.py  a chain of engines that sleep where they would compute
    traffic.py    bytes and dot products by formula
    wire.py, stream.py   what engines say to each other: handshake, frames; sockets on which it ends in time
    mailbox.py, transport.py   keys and values from an engine to the next, and what came and was not taken yet
    engines.py    vLLM servers as child processes (process.py, keeper.py: one's start and certain end; places.py:
                  its cores or GPUs; arguments.py: what it may be told)
    serving.py    one server before the engines
    front.py, completion.py, relaying.py, asking.py   HTTP: what comes, whom it is sent to, what goes back
    routing.py, prefixes.py, counts.py   chain or one engine; what caches hold; what is counted
    fleet.py, engine.py   the engines as the front sees them
    sglang.py     ranks of one SGLang server as a chain: settings.py (what its user says), shares.py and batch.py (how a
                  pass over several sequences is shared), handover.py (keys and values over a process group),
                  lowest.py (attention of a prompt's last tokens), probe.py (a chain measured in a second)
    picture.py    a split explained: table and timeline
    commands.py   `forerun runahead …`

Axes: L layers, R engines, K splits looked at together.

Source: KV-Runahead: Scalable Causal LLM Inference by Parallel Key-Value Cache Generation, arXiv 2405.05329.
"""
