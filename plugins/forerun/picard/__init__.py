"""Picard sampling: all points of a diffusion trajectory at once, iterated until they stop changing.

A sequential sampler makes T dependent model calls. A *sweep* guesses the whole trajectory, evaluates the model at every
point of a window in one batched call, and rebuilds the trajectory with the base sampler's own arithmetic. After k
sweeps the first k points are final, so the limit, reached in at most T sweeps, is the sequential result itself.

    solver.py     the base sampler as a black box (`Solver`)
    base_solver.py, draws.py, timesteps.py   a diffusers scheduler as one, its random draws, its loop
    levels.py     noise levels of the points and what they say about the model before it is asked
    predict.py    what the model would answer at a point that has moved: frozen (plain Picard) or by secants
    anderson.py   triangular Anderson mixing of whole trajectories
    stopping.py   when a point counts as converged
    window.py     the sweeps: which points to evaluate, rebuild, accept, slide
    opening.py    a run's first sweep, asked before the run has seen its batch
    switch.py     model switching: which points a Picard Consistency Model answers, and with what weight
    consistency.py, lora.py   such a model on disk, and on a base model, its scale each row's own
    training.py   trains one: training_choices.py what it is given, trainer.py its state turn by turn,
                  trajectories.py the sequential runs, objective.py what should have been answered
    options.py    what a user chooses
    run.py        one loop over timesteps, each turn a sweep, until the window is done
    ranks.py      a window's points over the ranks of a process group
    cost.py       whether a batch of points is cheaper than the calls it replaces
    report.py     what a run did
    denoiser.py   widens a model's call from one point to a window; diffusers_hooks.py: one scheduler's hooks
    loops.py      what a pipeline's loop computes from its counter or its timestep
    rules.py      pipelines and arguments that a sweep would get wrong, and what is done about each
    diffusers.py  `PicardScheduler`, the drop-in; diffusers_training.py: pipelines and bare models to train for
    commands.py, train_settings.py, diffusers_train.py, demo.py   `forerun picard …`, `forerun demo`

Axes: T points of the trajectory (model calls of the sequential run), W points of the window, B batch, R rows of a
pipeline's own model call (the batch, stacked for guidance).

Source: Parallel Sampling of Diffusion Models, arXiv 2305.16317; Picard Consistency Model for Fast Parallel Sampling of
Diffusion Models, arXiv 2503.19731; Accelerating Parallel Sampling of Diffusion Models (ParaTAA), arXiv 2402.09970.
"""
