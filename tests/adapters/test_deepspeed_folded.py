"""What of DeepSpeed and transformers the shuffled decoder layer stands on."""

import ast
import inspect
import textwrap

import pytest

pytest.importorskip("deepspeed")

import transformers
from deepspeed.module_inject.auto_ep_folding import FoldingGroupHandles, ParallelFoldingSpec
from deepspeed.module_inject.layers import LinearAllreduce

from forerun_adapters import deepspeed_folded as host

EXPECTED = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(...)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""


class _Dots(ast.NodeTransformer):
    """The attention's arguments, each passed on under its own name, as dots."""

    def visit_Call(self, node):
        if ast.unparse(node.func) == "self.self_attn":
            assert not node.args
            assert all(ast.unparse(keyword.value) == (keyword.arg or "kwargs") for keyword in node.keywords)
            return ast.Call(node.func, [ast.Constant(...)], [])
        return node


@pytest.mark.parametrize("name", host.DECODERS)
def test_a_decoder_layer_does_what_the_shuffled_one_does(name):
    family = name.removesuffix("DecoderLayer")
    module = inspect.getmodule(getattr(transformers, f"{family}ForCausalLM"))
    function = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, name).forward))).body[0]
    assert [argument.arg for argument in function.args.args[:2]] == ["self", "hidden_states"]
    assert ast.unparse(_Dots().visit(ast.Module(function.body, []))) == ast.unparse(ast.parse(EXPECTED))


def test_a_row_parallel_projection_has_what_is_left_out():
    names = LinearAllreduce.forward.__code__.co_names
    assert {"matmul", "RowParallel", "add_bias"} <= set(names)
    assert list(inspect.signature(LinearAllreduce.forward).parameters) == ["self", "input"]


def test_folding_names_its_ranks():
    assert {"spec", "tp_group", "tp_ranks"} <= set(FoldingGroupHandles.__dataclass_fields__)
    assert {"tp_size", "ep_size"} <= set(ParallelFoldingSpec.__dataclass_fields__)
