"""Reads a pipeline's loop for what it computes from its counter or its timestep.

In a sweep the loop's `i` and `t` are not a step's: whatever the loop computes from them would be silently wrong for all
points but one. Handing them on whole (to the scheduler, the denoiser, a callback) is what sweeps are made for.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["computed_from_the_step"]

# Lines with one of these are looked after elsewhere: by an argument's rule (rules.py), by a cut of the window, by the
# check of the timestep that the model is given, or they only move the progress bar and the callback.
_LOOKED_AFTER = (
    "_current_timestep",
    "adapter_conditioning_factor",
    "boundary_timestep",
    "cache_context",
    "callback",
    "cfg_trunc",
    "control_guidance_end",
    "controlnet_keep",
    "len(timesteps) - 1",
    "len(timesteps) < s",
    "num_grounding_steps",
    "num_warmup_steps",
    "progress_bar",
    "sag_scale",
    "skip_layer_guidance",
    "step_idx",
    "temp_ts",
    "timesteps[i - 1]",
    "use_dynamic_cfg",
)
_TIMESTEP_NAMES = ("t_", "timestep", "current_timestep")


def computed_from_the_step(pipeline: type[Any]) -> list[str]:
    """Lines of the pipeline's loop that compute something from its counter or timestep; empty where none is found.

    A loop is found where it goes over something named `timesteps`; a pipeline whose source cannot be read has none.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(pipeline.__call__)))
    except (OSError, TypeError):
        return []
    return sorted({line for loop in _loops(ast.parse(source)) for line in _computed(loop)})


def _loops(tree: ast.AST) -> Iterator[ast.For]:
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and "timesteps" in ast.unparse(node.iter):
            yield node


def _computed(loop: ast.For) -> Iterator[str]:
    targets = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    parents = {child: parent for parent in ast.walk(loop) for child in ast.iter_child_nodes(parent)}
    for name in ast.walk(loop):
        if not (isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and name.id in targets):
            continue
        use = _use(name, parents)
        if use is None:
            continue
        statement = _statement(name, parents)
        around = [statement, *_tests_around(statement, parents)]
        text = " ".join(ast.unparse(part) for part in around)
        if any(word in text for word in _LOOKED_AFTER):
            continue
        if isinstance(use, ast.BinOp) and _assigns_a_timestep(statement):
            continue  # the model's own form of the timestep: checked against the scheduler's when the model is called
        yield ast.unparse(statement)


def _use(name: ast.Name, parents: dict[ast.AST, ast.AST]) -> ast.AST | None:
    """The comparison, arithmetic or look-up that the name goes into; None where it is handed on whole."""
    node: ast.AST = name
    while not isinstance(parent := parents[node], ast.stmt):
        if isinstance(parent, (ast.Compare, ast.BinOp)) or (isinstance(parent, ast.Subscript) and parent.slice is node):
            return parent
        if isinstance(parent, ast.Attribute) and parent.attr == "item":
            return parent
        if isinstance(parent, ast.Call) and not (
            isinstance(parent.func, ast.Name) and parent.func.id in ("float", "int")
        ):
            return None
        node = parent
    return None


def _statement(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    """The statement a node stands in; of a compound one its test alone."""
    while not isinstance(parents[node], ast.stmt):
        node = parents[node]
    statement = parents[node]
    return node if isinstance(statement, (ast.If, ast.While, ast.For, ast.With)) else statement


def _tests_around(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.expr]:
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If):
            yield node.test


def _assigns_a_timestep(statement: ast.AST) -> bool:
    if not isinstance(statement, ast.Assign):
        return False
    return all(ast.unparse(target).startswith(_TIMESTEP_NAMES) for target in statement.targets)
