"""`brewjax compile`: the TPU compiler on a machine without a TPU."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from brewjax.aot import hlo
from brewjax.aot.program import TracedProgram
from brewjax.aot.report import Memory, advice, compile_work
from brewjax.aot.topology import GIB, topology
from brewjax.cli import app
from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.flops import model_flops
from brewjax.model.params import model_size
from brewjax.model.sharding import MeshConfig
from brewjax.train.loop import TrainConfig

MODEL = (
    "{name: small, vocab_size: 256, d_model: 128, layers: 3, heads: 2, kv_heads: 2, head_dim: 128, d_ff: 256, "
    "compute_dtype: bfloat16, remat: true}"
)
PLAN = """
name: small
model: {model}
train: {{steps: 10, batch_size: 8, seq_len: 128, gradient_accumulation_steps: 2, mesh: {{fsdp: 2, data: 2}}}}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(model=tmp_path / "model.yaml"))
    return path


def test_a_training_step_compiles_for_chips_that_are_not_there(plan):
    # In a process of its own: what other tests have traced changes what is counted.
    command = [sys.executable, "-m", "brewjax", "compile", str(plan), "--topology", "v5e-2x2"]
    result = subprocess.run(command, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    assert "v5e-2x2: data=2 fsdp=2" in result.stdout
    assert re.search(r"peak of a device +│ 0\.0\d+ GiB: 0\.\d% of 15\.75 GiB", result.stdout)
    # Forward, and once more for the gradient; two parts of a step, three layers.
    assert re.search(r"kernel token_label_attention_forward +│ 12 times", result.stdout)
    assert re.search(r"kernel token_label_attention_backward +│ 6 times", result.stdout)
    assert re.search(r"all-gather +│ +\d+", result.stdout)
    assert re.search(r"estimated cycles +│ [1-9]", result.stdout)


SLICES = ["--topology", "2xv5e-2x2", "--set", "train.mesh.fsdp=4", "--set", "train.batch_size=16"]


@pytest.mark.long
def test_slices_send_each_other_gradients_and_no_more(plan):
    """In a process of its own: in one that compiled much else before, libtpu was seen to forget the slices."""
    command = [sys.executable, "-m", "brewjax", "compile", str(plan), *SLICES]
    result = subprocess.run(command, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "2xv5e-2x2: data=2 fsdp=4" in result.stdout
    assert re.search(r"a device sends between slices, in no estimate here +│ 0\.\d+ GiB", result.stdout), result.stdout
    assert set(re.findall(r"│ ([\w-]+) between slices", result.stdout)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9-2x2"], "topology 'v9-2x2': expected CHIP-SHAPE, or SLICESxCHIP-SHAPE; known: v5e-16x16"),
        (["--topology", "v5e-2x2x2"], "chips of v5e lie in shapes such as v5e-16x16"),
        (["--topology", "v5e-3x3"], "the compiler refuses it"),
        (["--topology", "v5e-4x4"], "mesh data=2 fsdp=2 .*does not make use of 16 devices"),
        (
            ["--topology", "v5e-2x2", "--set", "train.batch_size=12"],
            "train.batch_size .12. / gradient_accumulation_steps .2. must be a multiple",
        ),
        (["--topology", "v5e-2x2", "--set-model", "d_model=129"], "axis 'weight' of size 129 does not divide over 2"),
        (["--topology", "v5e-2x2", "--set", "train.batch_sizes=6"], "did you mean 'batch_size'"),
        (["--topology", "v5e-2x2", "--score", "100"], "100 tokens are not whole pages of 64"),
        (["--topology", "v5e-2x2", "--score", "128,2"], "a past needs data=1, fsdp=1 and expert=1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(plan, arguments, message):
    result = CliRunner().invoke(app, ["compile", str(plan), *arguments])
    assert result.exit_code != 0
    assert re.search(message, str(result.exception)), result.exception


def test_a_shape_is_written_either_way():
    assert [len(topology(name).devices) for name in ("v5p:2x2x1", "v6e-1x1", "tpu7x-2x2x1")] == [4, 1, 8]


HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[32,8] {
  %all-reduce.9 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=mesh['x'=4,'y'=2] {'y'}
  ROOT %dynamic-slice.1 = bf16[32,8]{1,0} dynamic-slice(%all-reduce.9)
}

%starts (p: bf16[8,4]) -> (bf16[8,4], bf16[16,4]) {
  %all-gather.1 = bf16[16,4]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[8,4], bf16[16,4]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[8,4]) -> bf16[16,4] {
  %all-gather.2 = bf16[16,4]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[16,4] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%inner (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = (f32[8]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups={{0,2},{1,3}}, to_apply=%add
  %kernel.2 = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%seven (x: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={}
  ROOT %lt.1 = pred[] compare(%i, %limit), direction=LT
}

%who_knows (x: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[8,4]) -> f32[8] {
  %s = (bf16[8,4], bf16[16,4]) fusion(%p), kind=kCustom, calls=%starts
  %g = bf16[16,4] fusion(%s), kind=kCustom, calls=%goes_on
  %r = bf16[32,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %w = (s32[], f32[8]) while(%t), condition=%seven, body=%inner, metadata={op_name="jit(step)/jvp()/while"}
  %send.1 = (f32[8], u32[], token[]) send(%y), megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"
  ROOT %u = (s32[], f32[8]) while(%w), condition=%who_knows, body=%inner
}
"""


def test_loops_are_multiplied_in_and_what_runs_beside_others_is_counted_once():
    program = hlo.read(HLO)
    actual = {
        (collective.kind, collective.shape, collective.devices): times
        for collective, times in program.collectives.items()
    }
    assert actual == {
        ("all-gather", "bf16[16,4]", 2): 1,
        ("reduce-scatter", "bf16[64,8]", 2): 1,
        ("all-reduce", "f32[8] + f32[4]", 2): 7 + 1,
        ("all-reduce between slices", "f32[8]", 4): 1,
    }
    assert program.cycles.total() == 80
    assert hlo.read(HLO, turns=3).cycles.total() == 100
    assert program.kernels == {"kernel": 8}
    assert sum(program.unknown_loops.values()) == 1
    sizes = {collective.kind: (collective.size, collective.sent) for collective in program.collectives}
    assert sizes == {
        "all-gather": (128, 64),
        "reduce-scatter": (1024, 512),
        "all-reduce": (48, 48),
        "all-reduce between slices": (32, 48),
    }


def test_an_operation_is_named_by_its_scopes_and_its_pass():
    name = "jit(step)/forward_backward/transpose(jvp(mlp))/while/body/checkpoint/rematted_computation/dot_general"
    rest = f'metadata={{op_name="{name}"}}'
    assert hlo._source(rest) == "mlp/dot_general, recomputed"
    assert hlo._source(rest.replace("/rematted_computation", "")) == "mlp/dot_general, backward"
    assert hlo._source(rest.replace("transpose(jvp(mlp))", "jvp(mlp)").replace("/rematted_computation", "")) == (
        "mlp/dot_general, forward"
    )


def test_what_does_not_fit_is_no_error():
    where = topology("v5e-1x1")
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("one",), devices=where.devices), jax.P())
    x = jax.ShapeDtypeStruct((2**20, 2**12), jnp.float32, sharding=sharding)
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        compiled = compile_work(TracedProgram("doubled", jax.jit(lambda x: 2 * x).trace(x), x, 0, 0))
    assert compiled.program is None
    assert compiled.memory.arguments == 16 * GIB
    assert compiled.memory.peak > where.chip.hbm


def test_flops_are_two_for_each_parameter_of_a_layer():
    model = ModelConfig.load("configs/models/brew-mini.yaml")
    products, attention = model_flops(model, 1, 1)
    matrices = (
        model_size(model).parameters - (2 * model.layers + 1) * model.d_model - 2 * model.vocab_size * model.d_model
    )
    assert products == 2 * matrices
    assert model_flops(model, 2, 10, 5)[1] / attention == 2 * 10 * (10 / 2 + 5) * 2
    model = model.model_copy(update={"experts": ExpertsConfig(num_experts=8, num_experts_per_tok=2)})
    mlps = 2 * model.layers * 3 * model.d_model * model.d_ff
    assert model_flops(model, 1, 1) == (products - mlps, attention + 2 * mlps)  # experts are kernels


def test_advice_begins_with_what_costs_least():
    plain = ModelConfig(name="small", d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_ff=8)
    saving = plain.model_copy(update={"remat": True})
    mesh = MeshConfig().build()
    rows = 4 * mesh.size
    config = TrainConfig(steps=1, batch_size=rows, seq_len=64)
    little, much = Memory(GIB, 0, 0, 20 * GIB), Memory(15 * GIB, 0, 0, 20 * GIB)
    assert "optimiser state alone take 15.00 GiB" in advice(plain, config, mesh, much, 16 * GIB)
    assert "remat: true" in advice(plain, config, mesh, little, 16 * GIB)
    assert "train.gradient_accumulation_steps=4" in advice(saving, config, mesh, little, 16 * GIB)
    single = config.model_copy(update={"gradient_accumulation_steps": 4})
    assert "train.mesh.context=2" in advice(saving, single, mesh, little, 16 * GIB)
