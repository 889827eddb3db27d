"""A start finds the compiled programs of an earlier one, unless an input of them has changed."""

import contextlib
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from l4jax.engine import program_cache, runner
from l4jax.engine.program_cache import Call, Program, ProgramCache
from tests.engine.engines import GREEDY, make_engine, run_all


@pytest.fixture(autouse=True)
def _jax_keeps_nothing():
    """What a CPU's program was read from cannot be written again."""
    was_kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", was_kept)
    compilation_cache.reset_cache()


class Traced:
    """A program that counts how often it is traced."""

    def __init__(self, factor: int = 2):
        self.count = 0

        def double(x, *, times: int):
            self.count += 1
            return factor * times * x

        self.function = jax.jit(double, static_argnames="times")

    def call(self, size: int = 4, times: int = 1) -> Call:
        return Program(self.function, {"times": times}), (jnp.arange(size),)


def make(folder, about: str = "this") -> ProgramCache:
    return ProgramCache(about, jax.devices()[:1], contextlib.nullcontext, folder)


def compile_one(folder, call: Call, about: str = "this") -> list[int]:
    """What a start that compiles this program, or finds it, gets from it."""
    started = make(folder, about)
    started.compile({"it": call})
    return started.run("it", *call).tolist()


def test_a_second_start_traces_nothing_and_gives_the_same(tmp_path):
    first, second = Traced(), Traced()
    assert compile_one(tmp_path, first.call()) == [0, 2, 4, 6]
    assert compile_one(tmp_path, second.call()) == [0, 2, 4, 6]
    assert (first.count, second.count) == (1, 0)


@pytest.mark.parametrize("change", ["about", "shape", "static", "sources", "flags", "place"])
def test_what_has_changed_is_compiled_anew(tmp_path, monkeypatch, change):
    compile_one(tmp_path, Traced().call())
    program = Traced()
    call = program.call(5 if change == "shape" else 4, 3 if change == "static" else 1)
    if change == "sources":
        monkeypatch.setattr(program_cache, "hash_sources", lambda: "edited")
    if change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    if change == "place":
        call = call[0], jax.device_put(call[1], jax.devices()[1])
    compile_one(tmp_path, call, "that" if change == "about" else "this")
    assert program.count == 1


def test_a_file_cut_short_is_made_anew(tmp_path):
    compile_one(tmp_path, Traced().call())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    second, third = Traced(), Traced()
    assert compile_one(tmp_path, second.call()) == [0, 2, 4, 6]
    assert compile_one(tmp_path, third.call()) == [0, 2, 4, 6]
    assert (second.count, third.count) == (1, 0)


def test_where_nothing_can_be_kept_a_start_goes_on(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    assert compile_one(folder / "kept", Traced().call()) == [0, 2, 4, 6]


def test_those_used_longest_ago_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "_KEPT", 2)
    for size in (4, 5, 4, 6):  # 5 is the one used longest ago when 6 comes
        compile_one(tmp_path, Traced().call(size))
    program = Traced()
    for size in (4, 6):
        compile_one(tmp_path, program.call(size))
    assert program.count == 0
    compile_one(tmp_path, program.call(5))
    assert program.count == 1


def test_programs_are_lowered_in_their_order(tmp_path, monkeypatch):
    """Whichever of their threads comes first."""
    lowered, locate = [], ProgramCache._locate

    def tell(x, *, times: int):
        lowered.append(times)
        return times * x

    def locate_slowly(self, call):
        time.sleep(0.2 - 0.05 * call[0].static["times"])
        return locate(self, call)

    monkeypatch.setattr(ProgramCache, "_locate", locate_slowly)
    function = jax.jit(tell, static_argnames="times")
    calls = {times: (Program(function, {"times": times}), (jnp.arange(3),)) for times in range(4)}
    started = make(tmp_path)
    started.compile(calls)
    assert lowered == [0, 1, 2, 3]
    assert started.run(3, *calls[3]).tolist() == [0, 3, 6]


def test_what_is_compiled_behind_is_awaited_and_its_failure_told(tmp_path):
    def fail(x):
        raise ValueError("no such shape")

    started, program = make(tmp_path), Traced()
    x = jnp.arange(4)
    broken = Program(jax.jit(fail)), (x,)
    started.compile_in_background({"broken": broken, "it": program.call()})
    assert started.run("it", *program.call()).tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="no such shape"):
        started.run("broken", *broken)
    assert program.count == 1


class Known:
    """A function that may be called by what was compiled of it, and not be lowered any more."""

    def __init__(self, function):
        self.__name__ = function.__name__

    def lower(self, *arguments, **static):
        raise AssertionError(f"{self.__name__} was lowered again")


@pytest.mark.parametrize("mesh", ["1", pytest.param("8", marks=pytest.mark.slow)])
def test_a_second_engine_starts_without_lowering_and_draws_the_same(tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(runner, "find_program_folder", lambda device: tmp_path)

    def start():
        return make_engine("scout-8-image", mesh, max_num_batched_tokens=16, max_num_seqs=1)

    engine = start()
    engine.warm_up()
    engine.runner.wait_for_compilers()
    engine = start()
    functions = engine.runner.functions
    known = {name: Known(functions[name]) for name in ("step", "decode_loop", "encode_tiles")}
    engine.runner.functions = {**functions, **known}
    engine.warm_up()
    for changes in ({}, {"logprobs": 1}):
        engine.add(list(range(4, 40)), GREEDY.replace(max_tokens=4, **changes))
    plain, adjusted = run_all(engine).values()
    assert plain == adjusted and len(plain) == 4
