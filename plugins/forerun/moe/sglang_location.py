"""A plan's placement as SGLang's own option `--init-expert-location` takes it, for servers that stay as they are.

It puts experts where the plan has them whatever moves the tokens (DeepEP and its family among it), which forerun leaves
to SGLang there. SGLang looks places up by `--ep-dispatch-algorithm`, which newer releases set by themselves: "dynamic"
where the all-to-all backend is "none", "static" elsewhere.
"""

from __future__ import annotations

import numpy as np

from forerun.moe.plan import Plan

__all__ = ["location"]


def location(plan: Plan) -> dict[str, list[list[int]]]:
    """`{"physical_to_logical_map": [layers, E]}`: the expert at each place, rank by rank; the option's file, as JSON.

    Layers are counted as the model counts them, to the last one with experts; those without have them in order.
    """
    layers = plan.identity.layers
    order = np.tile(np.arange(plan.identity.experts), (max(layers) + 1, 1))
    order[list(layers)] = plan.order
    return {"physical_to_logical_map": order.tolist()}
