"""DLRM: sharding plans for embedding tables, with a proven gap.

A recommendation model's embedding tables are spread over the ranks; the slowest rank sets the pace. A *plan* says of
every table how it is cut into shards and where each lies. Its rating is the largest sum of estimated costs of a rank.

    problem.py    what is to be planned, as plain arrays: options x shards x cost x memory, ranks in hosts
    spread.py, options.py, check.py   where an option's shards may go, what it takes as a whole, whether arrays fit
    best.py       the best plan that the time allows, and how far from the best possible it may be
    bound.py      a lower bound of every plan's rating
    decompose.py  a tighter one where few ranks make a host: master.py mixes hosts' patterns, patterns.py finds them
    search.py     plans: packing.py the first for a rating, local_search.py and renew.py better ones,
                  placement.py what lies where meanwhile, budget.py how long it may go on
    merge.py      co-located tables as one
    exact.py      the best plan, by an integer programme (programme.py), for as long as its deadline allows
    highs.py      the solver of both, silent
    infeasible.py   what is missing where nothing fits
    diff.py       what changes from one plan to another, and the bytes that move
    report.py     what a plan puts where and how good it is, as a user sees it
    torchrec.py   `DLRMPlanner`, the drop-in for torchrec's planner
    torchrec_enumerator.py, torchrec_space.py, torchrec_search.py   torchrec's options listed quickly, as a problem,
                  and the search in torchrec's own loop
    torchrec_objective.py   what plans are rated by
    torchrec_inputs.py, torchrec_clock.py, torchrec_group.py   what it is given, looked at first; how a time limit is
                  shared out; one rank's plan for all ranks
    calibrate.py, measure.py, calibration.py, torchrec_topology.py   this machine's constants: the ranks that measure,
                  how, the file, the topology that takes it
    torchrec_files.py     plans from files alone: tables_file.py tables as CSV, topology_file.py ranks as JSON
    torchrec_pooling.py, torchrec_caching.py, torchrec_batches.py   pooling factors and cache statistics measured over
                  batches
    synthetic.py  ids to look up, without a log
    garbage.py    no garbage collection while options are made by the million
    commands.py, demo.py   `forerun dlrm …`, `forerun demo`

Axes: F tables, O options (ways to shard a table), S shards, R ranks.

Source: Deep Learning Recommendation Model, arXiv 1906.00091.
"""
