"""launch.profiler: which calls are traced, and where the trace goes."""

import contextlib

import jax
import pytest

from launch import profiler


def profile_into(folder):
    profiler.FLAGS.parse([f"--profile={folder}"])


@pytest.mark.parametrize("calls", [2, 4, 9])
def test_calls_3_to_5_are_traced(calls, tmp_path, monkeypatch, caplog):
    traced, on = [], []

    @contextlib.contextmanager
    def trace(folder):
        assert folder == str(tmp_path / "new") and (tmp_path / "new").is_dir()
        on.append(True)
        yield
        on.pop()

    def work(number):
        traced.extend([number] * len(on))
        return number

    monkeypatch.setattr(jax.profiler, "trace", trace)
    profile_into(tmp_path / "new")
    with profiler.some_calls(work) as worked:
        assert [worked(n) for n in range(1, calls + 1)] == list(range(1, calls + 1))
    assert traced == [n for n in range(1, calls + 1) if 3 <= n <= 5] and not on
    assert ("no trace" in caplog.text) == (calls < 3)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    profile_into(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"), profiler.some_calls(print):
        pass


def test_no_profile_leaves_the_function_as_it_is():
    profiler.FLAGS.parse([])
    with profiler.some_calls(print) as function:
        assert function is print
