"""Every strategy samples the tokens of one device: expert, context and data parallelism."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from l4jax import axes, cache, decode
from l4jax.config import MAVERICK, SCOUT
from l4jax.engine import context_parallel, expert_parallel
from l4jax.engine.capacity import choose_page
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.local_kernels import make_kernels
from l4jax.kernels import PORTABLE, REFERENCE, reference
from l4jax.kernels.reference import HeadTransform, Norm
from l4jax.strategies import CONTEXT, EXPERT, activate, check_mesh, choose_strategy
from sharding import Layout, MeshError, make_mesh
from tests import tiers, weights
from tests.engine.engines import (
    GREEDY,
    STRATEGIES,
    assert_all_free,
    find_tiles,
    get_pool,
    load_runner,
    make_engine,
    run_all,
)

GOLDENS = ("scout-8-image", "maverick-32-text", "scout-32-image")


@pytest.mark.parametrize(("mesh", "name"), tiers.pairs(STRATEGIES, GOLDENS))
def test_every_strategy_samples_the_reference_tokens(mesh, name):
    golden = weights.read_golden(name)
    engine = make_engine(name, mesh, block_size=2)
    for _ in range(2):  # with data shards one for each
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    found = run_all(engine)
    assert found[0] == found[1] == golden.greedy_tokens.tolist()
    assert_all_free(engine)
    for leaf in jax.tree.leaves(get_pool(engine.runner)):
        assert leaf.sharding.is_equivalent_to(
            engine.runner.layout.place(cache.POOL_AXES), leaf.ndim
        )


@pytest.mark.parametrize("mesh", tiers.every(4, STRATEGIES))
def test_logits_of_every_strategy_equal_one_devices(mesh):
    """Float32 logits of a prompt over 12 chunks, at each position."""
    ids = np.random.default_rng(0).integers(4, 300, 96).astype(np.int32)
    plain, sharded = (_score(each, ids) for each in ("1", mesh))
    np.testing.assert_allclose(sharded, plain, atol=2e-4)


def _score(mesh: str, ids: np.ndarray) -> np.ndarray:
    """Compute the logits of a prompt in one step, with the pages of an engine's sizes."""
    engine = make_engine("scout-8-text", mesh, block_size=2)
    runner, geometry = engine.runner, engine.limits.geometry
    shards, size = engine.limits.shards, len(ids)
    rows = size // geometry.chunk
    own = geometry.count_global(size)
    local_GRB = own + np.arange(3 * rows * geometry.count_local(size)).reshape(3, rows, -1)
    position = np.arange(size, dtype=np.int32)
    batch = cache.Batch(
        np.tile(ids, shards),
        np.tile(position, shards),
        np.tile(position // geometry.chunk, shards),
        cache.PageTables(
            np.tile(np.arange(own, dtype=np.int32), (shards * rows, 1)),
            np.tile(local_GRB.astype(np.int32), (1, shards, 1)),
        ),
    )
    with runner.activate():
        batch = jax.device_put(batch, runner.layout.place_all(cache.name_axes()))
        _, logits = decode.score(runner.params, get_pool(runner), batch, model=runner.model)
    runner.pool = None  # donated
    return np.asarray(logits)[:size]


EXPERT_MESHES = ("4", "2x2", "4x1", "data=2,seq=2,model=2")
ROUTINGS = {
    "random": lambda rng, size: rng.integers(0, 8, size),
    "one expert": lambda rng, size: np.full(size, 5),
    "no token for half of the experts": lambda rng, size: rng.integers(4, 8, size),
}


@pytest.mark.parametrize(("mesh", "routing"), tiers.pairs(EXPERT_MESHES, list(ROUTINGS)))
@pytest.mark.parametrize("gathers", [True, False])
def test_every_token_is_computed_by_its_expert_whatever_the_routing(
    monkeypatch, mesh, routing, gathers
):
    tokens, width, hidden, experts = 48, 16, 8, 8
    monkeypatch.setattr(expert_parallel, "GATHERED_TOKENS", 10**6 if gathers else 0)
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    norm, gate_T = Norm(draw(width), 1e-5), jax.nn.sigmoid(draw(tokens))
    expert_T = jnp.asarray(ROUTINGS[routing](rng, tokens), jnp.int32)
    arguments = (
        *(draw(tokens, width), norm, expert_T, gate_T),
        *(draw(experts, 2, hidden, width), draw(experts, width, hidden)),
        *(draw(2, hidden, width), draw(width, hidden)),
    )
    layout = Layout(make_mesh(mesh), choose_strategy(mesh, enable_expert_parallel=True))
    with activate(layout):
        found = make_kernels(PORTABLE, layout).mix_experts(*arguments)
    np.testing.assert_allclose(found, reference.mix_experts(*arguments), atol=2e-4)


def test_tokens_beyond_a_rounds_capacity_travel_in_the_next_round(monkeypatch):
    """All tokens of all devices go to one expert: as many rounds as the capacity asks for."""
    rounds = []
    plain = PORTABLE.run_experts

    def count(x_TD, *rest, **options):
        jax.debug.callback(lambda: rounds.append(len(x_TD)))
        return plain(x_TD, *rest, **options)

    monkeypatch.setattr(expert_parallel, "GATHERED_TOKENS", 0)
    layout = Layout(make_mesh("4x1"), EXPERT)
    tokens, width, ones = 256, 4, jnp.ones
    arguments = (
        *(ones((tokens, width)), Norm(ones(width), 1e-5), jnp.zeros(tokens, jnp.int32)),
        *(ones(tokens), ones((4, 2, 8, width)), ones((4, width, 8))),
        *(ones((2, 8, width)), ones((width, 8))),
    )
    kernels = dataclasses.replace(PORTABLE, run_experts=count)
    with activate(layout):
        found = make_kernels(kernels, layout).mix_experts(*arguments)
        jax.effects_barrier()
    np.testing.assert_allclose(found, reference.mix_experts(*arguments), rtol=1e-5)
    # Each of four devices: the shared expert on its 64 tokens, and 64 tokens to one device in two
    # rounds of 32 (twice the 16 of an even routing).
    assert sorted(rounds) == [64] * 4 + [128] * 8


@pytest.mark.parametrize(("stripe", "stripes"), [(1, 2), (2, 4), (4, 3)])
def test_a_token_sees_exactly_the_stored_positions_up_to_its_own(stripe, stripes):
    positions = np.arange(-1, 60)
    owners = [[p for p in range(60) if p // stripe % stripes == i] for i in range(stripes)]
    for index, stored in enumerate(owners):
        found = context_parallel.find_last_stored(jnp.asarray(positions), stripe, stripes, index)
        wanted = [sum(p <= position for p in stored) - 1 for position in positions]
        assert found.tolist() == wanted


@pytest.mark.parametrize("kernels", [REFERENCE, PORTABLE], ids=["reference", "portable"])
@pytest.mark.parametrize("gathers", [True, False])
def test_striped_attention_equals_attention_over_all_pages(monkeypatch, kernels, gathers):
    """Two rows with different lengths, and padding, which sees no position on any device."""
    monkeypatch.setattr(context_parallel, "GATHERED_TOKENS", 10**6 if gathers else 0)
    layout = Layout(make_mesh("seq=4"), CONTEXT)
    kv_heads, group, head_dim, width, stripe = 2, 3, 8, 16, 2
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    norm, qkv = Norm(draw(width), 1e-5), draw(kv_heads, group + 2, head_dim, width)
    transform = HeadTransform()
    table_RB = jnp.asarray([[4, 0, 2], [1, 3, 5]], jnp.int32)
    shape = (6, kv_heads, stripe * 4, head_dim)
    pools = jnp.full(shape, jnp.nan), jnp.full(shape, jnp.nan)
    striped = tuple(
        pool.reshape(6, kv_heads, 4, stripe, head_dim)
        .transpose(2, 0, 1, 3, 4)
        .reshape(24, kv_heads, stripe, head_dim)
        for pool in pools
    )
    local = make_kernels(kernels, layout)
    assert local.attend_global is not None
    with activate(layout):
        for rows in ([(0, 13), (0, 6)], [(13, 14), (6, 20)], [(14, 24), (20, 21)]):
            position = [p for row in rows for p in range(*row)] + [-1] * 3
            row = [i for i, one in enumerate(rows) for _ in range(*one)] + [1] * 3
            x_TD = draw(len(position), width)
            tables = (table_RB, jnp.asarray(row, jnp.int32), jnp.asarray(position, jnp.int32))
            k, v = pools
            wanted, *pools = reference.attend(x_TD, norm, qkv, transform, k, v, *tables)
            found, *striped = local.attend_global(x_TD, norm, qkv, transform, *striped, *tables)
            np.testing.assert_allclose(found[:-3], wanted[:-3], rtol=1e-4, atol=1e-5)
            assert not np.isnan(found).any()


def test_context_parallelism_divides_the_pages_of_global_layers_only():
    plain, striped = (
        make_engine("scout-8-text", mesh, block_size=2).limits for mesh in ("1", "seq=4")
    )
    assert striped.geometry.count_global(128) == plain.geometry.count_global(128) // 4
    assert striped.geometry.count_local(128) == plain.geometry.count_local(128)
    layout = load_runner("scout-8-text", "seq=4").layout
    assert layout.spec(cache.POOL_AXES) == PartitionSpec(("data", "seq"), "model", None, None)
    assert layout.count(axes.STRIPES) == 4


def test_a_page_of_all_stripes_ends_with_the_chunk():
    assert choose_page(SCOUT, EngineConfig(), 4) == 128
    small = SCOUT.replace_text(chunk=256)
    assert choose_page(small, EngineConfig(), 8) == 32
    with pytest.raises(CapacityError, match=r"4 pages of it together must divide the .* of 256"):
        choose_page(small, EngineConfig(block_size=128), 4)
    with pytest.raises(CapacityError, match="3 devices of the seq axis cannot share"):
        choose_page(small, EngineConfig(), 3)


def test_meshes_that_a_strategy_cannot_use_are_refused_in_words():
    def check(config, mesh: str) -> None:
        rules = choose_strategy(mesh, enable_expert_parallel=True)
        check_mesh(config, Layout(make_mesh(mesh), rules))

    for mesh in ("8", "2x4", "4x2", "seq=2,model=4", "data=2,seq=2,model=2"):
        check(SCOUT, mesh)
        check(MAVERICK, mesh)
    few = SCOUT.replace_text(experts=4)
    with pytest.raises(MeshError) as raised:
        check(few, "2x4")
    assert str(raised.value) == (
        "--mesh 2x4: 8 devices cannot share 4 experts; the model axis may have 1 or 2 here: "
        "data=2,model=2."
    )
    with pytest.raises(ValueError, match="decode_context_parallel_size is 3: it must divide"):
        EngineConfig(tensor_parallel_size=8, decode_context_parallel_size=3)
    given = EngineConfig(tensor_parallel_size=8, decode_context_parallel_size=2)
    assert given.mesh_shape == "data=1,seq=2,model=4"
