"""Compiled programs are loaded at the next start, if nothing that they depend on has changed."""

import contextlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from l4jax.engine import program_cache, runner
from l4jax.engine.program_cache import Program, ProgramCache
from l4jax.llm import find_cache_folder
from tests.engine.engines import GREEDY, make_engine, run_all


@pytest.fixture(autouse=True)
def _disable_jax_cache():
    """On CPUs, an executable that jax loaded from its cache cannot be serialized."""
    settings: Any = jax.config  # its type has no settings
    was_kept = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", was_kept)
    compilation_cache.reset_cache()


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self):
        self.count = 0

        def double(x):
            self.count += 1
            return 2 * x

        self.function = jax.jit(double)

    def make_program(self, size: int = 4, key: str = "double") -> Program:
        return Program(key, self.function, (jnp.arange(size),))


def make_cache(folder, context: str = "this") -> ProgramCache:
    return ProgramCache(context, jax.devices()[:1], contextlib.nullcontext, folder)


def compile_one(folder, program: Program, context: str = "this") -> list[int]:
    """Compile a program or load it, as a start does, and return its result."""
    programs = make_cache(folder, context)
    programs.compile([program])
    return programs.run(*program).tolist()


def test_a_second_start_traces_nothing_and_gives_the_same(tmp_path):
    first, second = Traced(), Traced()
    assert compile_one(tmp_path, first.make_program()) == [0, 2, 4, 6]
    assert compile_one(tmp_path, second.make_program()) == [0, 2, 4, 6]
    assert (first.count, second.count) == (1, 0)


@pytest.mark.parametrize("change", ["context", "shape", "key", "sources", "flags", "device"])
def test_a_program_is_compiled_again_after_any_change(tmp_path, monkeypatch, change):
    compile_one(tmp_path, Traced().make_program())
    traced = Traced()
    program = traced.make_program(
        5 if change == "shape" else 4, "twice" if change == "key" else "double"
    )
    if change == "sources":
        monkeypatch.setattr(program_cache, "hash_sources", lambda: "edited")
    if change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    if change == "device":
        program = program._replace(args=jax.device_put(program.args, jax.devices()[1]))
    compile_one(tmp_path, program, "that" if change == "context" else "this")
    assert traced.count == 1


def test_a_truncated_file_is_written_again(tmp_path):
    compile_one(tmp_path, Traced().make_program())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    second, third = Traced(), Traced()
    assert compile_one(tmp_path, second.make_program()) == [0, 2, 4, 6]
    assert compile_one(tmp_path, third.make_program()) == [0, 2, 4, 6]
    assert (second.count, third.count) == (1, 0)


def test_files_with_swapped_contents_are_compiled_again(tmp_path):
    for size in (4, 5):
        compile_one(tmp_path, Traced().make_program(size))
    one, other = tmp_path.iterdir()
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    again, third = Traced(), Traced()
    for traced in (again, third):
        assert compile_one(tmp_path, traced.make_program(4)) == [0, 2, 4, 6]
        assert compile_one(tmp_path, traced.make_program(5)) == [0, 2, 4, 6, 8]
    assert (again.count, third.count) == (2, 0)


def test_a_damaged_file_is_removed_before_it_is_unpickled(tmp_path, monkeypatch):
    compile_one(tmp_path, Traced().make_program())
    (file,) = tmp_path.iterdir()
    written = bytearray(file.read_bytes())
    written[len(written) // 2] ^= 1
    file.write_bytes(written)
    monkeypatch.setattr(program_cache.pickle, "loads", lambda _: pytest.fail("unpickled"))
    assert program_cache._read(file, jax.devices()[:1]) is None
    assert not file.exists()


def test_a_folder_that_other_users_may_write_to_is_not_read(tmp_path, caplog):
    folder = tmp_path / "executables"
    compile_one(folder, Traced().make_program())
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    traced = Traced()
    assert compile_one(folder, traced.make_program()) == [0, 2, 4, 6]
    assert traced.count == 1 and "other users may write" in caplog.text


def test_a_program_that_cannot_be_stored_leaves_no_temporary_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(program_cache.os, "replace", fail)
    assert compile_one(tmp_path, Traced().make_program()) == [0, 2, 4, 6]
    assert not list(tmp_path.iterdir())


def test_a_start_goes_on_if_no_file_can_be_written(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    assert compile_one(folder / "kept", Traced().make_program()) == [0, 2, 4, 6]


def test_the_least_recently_used_programs_are_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "_KEPT", 2)
    for size in (4, 5, 4, 6):  # 6 evicts 5
        compile_one(tmp_path, Traced().make_program(size))
    traced = Traced()
    for size in (4, 6):
        compile_one(tmp_path, traced.make_program(size))
    assert traced.count == 0
    compile_one(tmp_path, traced.make_program(5))
    assert traced.count == 1


def test_programs_are_lowered_in_their_order(tmp_path, monkeypatch):
    """Independent of the order in which their threads run."""
    lowered, locate = [], ProgramCache._locate

    def make_function(key: int):
        def multiply(x):
            lowered.append(key)
            return key * x

        return jax.jit(multiply)

    def locate_slowly(self, program):
        time.sleep(0.2 - 0.05 * program.key)
        return locate(self, program)

    monkeypatch.setattr(ProgramCache, "_locate", locate_slowly)
    made = [Program(key, make_function(key), (jnp.arange(3),)) for key in range(4)]
    programs = make_cache(tmp_path)
    programs.compile(made)
    assert lowered == [0, 1, 2, 3]
    assert programs.run(*made[3]).tolist() == [0, 3, 6]


def test_a_program_that_compiles_in_the_background_is_awaited_and_its_error_raised(tmp_path):
    def fail(x):
        raise ValueError("no such shape")

    programs, traced = make_cache(tmp_path), Traced()
    assert programs.is_empty
    broken, double = Program("broken", jax.jit(fail), (jnp.arange(4),)), traced.make_program()
    programs.compile_in_background([broken, double])
    assert programs.run(*double).tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="no such shape"):
        programs.run(*broken)
    assert traced.count == 1
    assert not programs.is_empty and not programs.is_compiling
    assert programs.is_ready("double") and not programs.is_ready("broken")


class Compiled:
    """A function whose compiled program may run, but which may not be lowered again."""

    def lower(self, *args):
        raise AssertionError("a program was lowered again")


@pytest.mark.parametrize("mesh", ["1", pytest.param("8", marks=pytest.mark.slow)])
def test_a_second_engine_starts_without_lowering_and_samples_the_same(tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(runner, "find_program_folder", lambda device: tmp_path)

    def start():
        return make_engine("scout-8-image", mesh, max_num_batched_tokens=16, max_num_seqs=1)

    engine = start()
    engine.warm_up()
    engine.runner.wait_for_compilers()
    engine = start()
    functions = engine.runner.functions
    for key in functions.keys() - {"set_token_counts"}:
        functions[key] = Compiled()
    engine.warm_up()
    for changes in ({}, {"logprobs": 1}):
        engine.add(list(range(4, 40)), GREEDY.replace(max_tokens=4, **changes))
    plain, processed = run_all(engine).values()
    assert plain == processed and len(plain) == 4


@pytest.fixture
def unset_cache(monkeypatch):
    """Jax's own defaults, as in a new process."""
    names = ("jax_compilation_cache_dir", *program_cache._CACHE_OPTIONS)
    settings: Any = jax.config
    before = {name: getattr(settings, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_options_of_the_cache_win(tmp_path, monkeypatch, unset_cache):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    assert program_cache.enable_compilation_cache(tmp_path / "ours") is None
    assert unset_cache.jax_compilation_cache_dir == str(tmp_path / "ours")
    assert unset_cache.jax_persistent_cache_min_compile_time_secs == 7.0
    assert unset_cache.jax_persistent_cache_min_entry_size_bytes == -1
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert program_cache.enable_compilation_cache(tmp_path / "ours") is None
    assert unset_cache.jax_compilation_cache_dir == str(tmp_path / "theirs")


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_so(tmp_path, unset_cache):
    (tmp_path / "file").write_text("")
    line = program_cache.enable_compilation_cache(tmp_path / "file" / "compiled")
    assert line is not None and "set L4JAX_CACHE to a folder that can be written" in line
    assert unset_cache.jax_compilation_cache_dir is None


def test_a_user_without_a_home_has_no_cache(monkeypatch, unset_cache):
    def find_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("L4JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", find_home)
    line = program_cache.enable_compilation_cache(find_cache_folder() / "compiled")
    assert line is not None and line.startswith("Compiled programs are not kept (Not a directory")
