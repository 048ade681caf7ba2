"""The quickstart's sudokus, with a tiny network; its text is a run of tests/docs/test_commands.py."""

from support.commands import SUDOKU

from launch import command, quickstart


def test_both_orders_answer_every_board_and_one_is_drawn(tmp_path, monkeypatch):
    config = tmp_path / "tiny.py"
    config.write_text(SUDOKU)
    monkeypatch.setattr(quickstart, "SUDOKU", config)
    found = quickstart._sudoku(tmp_path / "run", boards=5)["sudoku"]
    orders = ["left to right", "easiest first, 16 passes", "easiest first, 4 passes"]
    assert list(found["solved"]) == orders and all(0 <= count <= 5 for count in found["solved"].values())
    drawn = (tmp_path / "run/order.svg").read_text()
    assert all(f">{order}<" in drawn for order in orders)


def test_boards_below_zero_are_refused(capsys):
    assert command.call(quickstart.main, quickstart.FLAGS, ["--boards=-1"]) == 2
    assert "--boards" in capsys.readouterr().err
