"""launch.train: its result, and the files that its flags ask for."""


def test_the_result_is_one_json_line_and_checkpoints_are_numbered(trained):
    folder, result = trained
    assert result["steps"] == 6 and result["loss"] > 0
    assert {p.name for p in (folder / "work/checkpoints").iterdir()} >= {"3", "6"}


def test_a_profile_and_compiled_programs_are_kept(trained):
    folder, _ = trained
    assert [path.name for path in (folder / "profile").glob("plugins/profile/*/*.xplane.pb")]
    assert list((folder / "programs").iterdir())
