"""launch.flags: a set of flags for each launcher, and one clear sentence for whatever is wrong."""

import pytest

from launch.flags import Flags


@pytest.fixture
def flags():
    shared = Flags()
    shared.integer("host_timeout", 30, "Seconds.", 5, 600)
    made = Flags(shared)
    made.string("workdir", None, "Folder of the run.", required=True)
    made.integer("max_new_tokens", 256, "Most tokens.", 1)
    made.multi_string("stop", [], "A string.")
    made.float("temperature", 1.0, "Divides the logits.", 0)
    made.bool("ignore_eos", False, "Never ends.")
    return made


def test_values_are_set_and_set_back(flags):
    flags.parse(["--workdir=a", "--max_new_tokens=3", "--stop=x", "--stop=y", "--ignore_eos", "--host_timeout=7"])
    values = flags.values
    assert (values.workdir, values.max_new_tokens, values.stop, values.ignore_eos) == ("a", 3, ["x", "y"], True)
    assert values.host_timeout == 7
    flags.parse(["--workdir=b"])
    assert (values.workdir, values.max_new_tokens, values.stop, values.ignore_eos) == ("b", 256, [], False)
    assert values.host_timeout == 30


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--workdri=a"], "no flag --workdri; did you mean --workdir?"),
        (["--max_tokens=3"], "did you mean --max_new_tokens?"),
        (["--tokens=3"], "did you mean --max_new_tokens?"),
        (["--zzz"], "no flag --zzz; --help lists all flags"),
        (["--workdir=a", "--max_new_tokens=0"], "--max_new_tokens=0"),
        (["--workdir=a", "--max_new_tokens=x"], "--max_new_tokens=x"),
        (["--workdir=a", "--host_timeout=1000"], "--host_timeout=1000"),
        (["--workdir=a", "--temperature=nan"], "--temperature=nan isn't a finite number"),
        (["--workdir=a", "--temperature=inf"], "--temperature=inf isn't a finite number"),
        (["--workdir=a", "train"], "unexpected argument 'train'"),
        (["--workdir"], "Missing value for flag --workdir"),
        ([], "--workdir is missing. Folder of the run."),
        (["--workdir=caf\udce9"], r"'--workdir=caf\\udce9' isn't valid UTF-8"),
        (["caf\udce9"], "isn't valid UTF-8"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, arguments, cause):
    with pytest.raises(ValueError, match=cause.replace("?", r"\?")) as error:
        flags.parse(arguments)
    assert "\n" not in str(error.value)


def test_two_launchers_may_have_flags_of_one_name():
    one, other = Flags(), Flags()
    first, second = one.integer("seed", 1, "A seed."), other.integer("seed", 2, "Another.")
    one.parse([]), other.parse(["--seed=3"])
    assert (first.value, second.value) == (1, 3)


def test_rows_have_each_flag_with_its_default(flags):
    rows = {row.name: row.default for row in flags.rows()}
    assert rows == {
        "host_timeout": "30", "ignore_eos": "false", "max_new_tokens": "256", "stop": "none",
        "temperature": "1.0", "workdir": "required"
    }  # fmt: skip


def test_out_needs_its_folder(tmp_path):
    flags = Flags()
    out = flags.out()
    flags.parse([])
    assert out() is None
    flags.parse([f"--out={tmp_path}/a.json"])
    assert out() == tmp_path / "a.json"
    flags.parse([f"--out={tmp_path}/no/a.json"])
    with pytest.raises(FileNotFoundError, match="its folder doesn't exist"):
        out()
