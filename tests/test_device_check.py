"""The prepared check of a GPU, on the CPU with tiny sizes: every part says its lines, and a failure ends none else."""

from benchmarks import device

TINY = ["--layers", "1", "--hidden-size", "64", "--feed-forward", "96", "--heads", "2", "--samples", "2"]
CALL = [*TINY, "--sequence-length", "32", "--device", "cpu"]


def test_all_parts_print_their_lines(capsys):
    parts = [name for name in device.PARTS if name != "tests"]
    assert device.main([*CALL, "--parts", *parts]) == 0
    printed = capsys.readouterr().out
    assert "ranks: one process through gloo: the same bits" in printed
    assert "products: torch's semi-structured tensors need CUDA" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    stages = {row[0]: {each[1] for each in rows if each[0] == row[0]} for row in rows}
    for run in ("wanda, none", "wanda, auto", "magnitude, none", "sparsegpt, none"):
        assert stages[run] == {"attention", "mlp", "files, checks, embedding", "all"}
    passes = {(row[0], row[1]): row[3] for row in rows}
    assert float(passes["wanda, none", "mlp"]) < float(passes["wanda, auto", "mlp"])
    assert {"dense", "without 20 %", "without 50 %"} <= stages.keys()


def test_a_failed_part_is_told_and_the_next_goes_on(monkeypatch, capsys):
    def broken(check):
        raise RuntimeError("of two\nlines")

    monkeypatch.setitem(device.PARTS, "shrink", broken)
    assert device.main([*CALL, "--parts", "shrink", "products"]) == 1
    printed = capsys.readouterr().out
    assert "shrink: failed, RuntimeError: of two lines" in printed and "products: torch" in printed


def test_without_time_nothing_is_begun(capsys):
    assert device.main([*CALL, "--parts", "prune", "--minutes", "0"]) == 1
    assert "prune: failed, TimeoutError: no time left" in capsys.readouterr().out
