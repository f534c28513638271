"""A profile reads: operations carry the names of the parts of the model and of the step that they belong to."""

import re

import jax
import pytest

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.sharding import MeshConfig
from brewjax.train.loop import TrainConfig, abstract_batch, abstract_state, make_step
from brewjax.train.objectives import supervised
from tests.tiny import MODEL

CONFIG = TrainConfig(steps=1, batch_size=1, seq_len=32)
MIXTURE = MODEL.model_copy(update={"experts": ExpertsConfig(num_experts=2, num_experts_per_tok=1)})


@pytest.mark.parametrize(("model", "mlp"), [(MODEL, "mlp"), (MIXTURE, "experts")])
def test_the_parts_of_a_training_step_are_named(model: ModelConfig, mlp: str):
    mesh = MeshConfig().build()
    with jax.set_mesh(mesh):
        inputs = abstract_state(model, CONFIG, mesh), abstract_batch(CONFIG, mesh)
        text = jax.jit(make_step(model, CONFIG, supervised)).lower(*inputs).as_text(debug_info=True)
    scopes = {scope for path in re.findall(r'loc\("([^"]*)"', text) for scope in re.split(r"[/()]", path)}
    assert scopes >= {"forward_backward", "optimizer", "embedding", "attention", mlp, "head"}
    assert not scopes & ({"mlp", "experts"} - {mlp})
